"""Reads image sets as rows: location of the image, labels and, if known, split and group; one module per layout."""

from data_shards.source.open import check_folders, check_source, open_source, resolved
from data_shards.source.row import ImageSet, Row

__all__ = ["ImageSet", "Row", "check_folders", "check_source", "open_source", "resolved"]
