"""The catalog: one TOML file per dataset in this folder, and how its files are downloaded."""

from data_shards.catalog.cards import DatasetCard, PublishedFile, card, names

__all__ = ["DatasetCard", "PublishedFile", "card", "names"]
