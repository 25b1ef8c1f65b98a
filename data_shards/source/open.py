"""Opens image sets: `open_source` reads only names and labels; pixels and encoded bytes are read row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards import catalog
from data_shards.config import DataConfig
from data_shards.source import phantoms
from data_shards.source.folders.rows import list_folders
from data_shards.source.labels import check_settings
from data_shards.source.npz import open_npz
from data_shards.source.row import ImageSet
from data_shards.source.table.rows import list_table
from data_shards.store import open_store

# As a setting: no such column, even if the catalog names one.
NO_COLUMN = "-"
# Fields of a card that describe its table; used if the configuration leaves them empty.
_OF_TABLES = ("table", "image_column", "label_column", "group_column", "split_column", "split_values")


def open_source(config: DataConfig) -> ImageSet:
    """The image set that `config` describes.

    Raises ValueError, with a remedy, for an unknown dataset, a missing source, an empty class folder, a table without a
    required column, a row without its file, a label out of range or a damaged file.
    """
    classes_named = bool(config.classes)
    config = resolved(config)
    check_settings(config)
    if config.layout == "phantoms":
        return phantoms.draw_phantoms(config.phantoms, config.seed)
    _require_source(config)
    if config.layout == "npz":
        return open_npz(config)
    if config.layout == "table":
        return list_table(config, classes_named=classes_named).image_set(config)
    return list_folders(config).image_set(config)


def check_folders(config: DataConfig) -> None:
    """ValueError if the folders of a `folders` set cannot be read as classes. Reads names only, no images."""
    config = resolved(config)
    if config.layout == "folders":
        check_settings(config)
        _require_source(config)
        list_folders(config)


def check_source(config: DataConfig) -> None:
    """ValueError if the source is not set or not found, or a setting does not fit the layout. Reads no files."""
    config = resolved(config)
    check_settings(config)
    if config.layout == "phantoms":
        return
    _require_source(config)
    if config.source.startswith("s3://"):
        _check_objects(config.source)
    elif "://" not in config.source and not Path(config.source).expanduser().exists():
        raise ValueError(f"{config.source} was not found; check --data.source")


def _check_objects(uri: str) -> None:
    """ValueError if neither an object of that name nor one below it exists."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    named = folder != "s3:/" and open_store(folder).head(name) is not None
    if not named and next(iter(open_store(uri).list()), None) is None:
        raise ValueError(f"{uri} was not found: no object has this key; check --data.source")


def _require_source(config: DataConfig) -> None:
    if not config.source:
        address = catalog.card(config.dataset).source if config.dataset in catalog.names() else ""
        raise ValueError(
            f"dataset {config.dataset!r} needs its files; {f'download them ({address}) and ' if address else ''}"
            "set --data.source to their location"
        )


def resolved(config: DataConfig) -> DataConfig:
    """The config, with fields left to the catalog filled in.

    Raises ValueError for a dataset that is not in the catalog and has no layout.
    """
    if config.layout == "folders" and config.split_column == NO_COLUMN:  # same switch as for a table's column
        config = config.model_copy(update={"split_folders": "ignore"})
    if config.dataset not in catalog.names() and config.layout not in ("catalog", "phantoms"):
        own = {"task": "multiclass"} if config.task == "catalog" else {}
        return config.model_copy(update=own | ({"split_column": ""} if config.split_column == NO_COLUMN else {}))
    card = catalog.card(config.dataset)
    update: dict[str, Any] = {
        field: getattr(card, field) for field in ("layout", "task") if getattr(config, field) == "catalog"
    }
    columns = _OF_TABLES if card.layout == "table" and config.layout in ("catalog", "table") else ()
    update |= {field: getattr(card, field) for field in ("classes", *columns) if not getattr(config, field)}
    if config.split_column == NO_COLUMN:
        update |= {"split_column": ""}
    if config.group_pattern:
        update |= {"group_column": ""}
    config = config.model_copy(update=update)
    if config.layout == "phantoms" and config.classes != phantoms.CLASSES:
        raise ValueError(
            f"classes are {config.classes}, but phantoms have the classes {phantoms.CLASSES}; remove --data.classes"
        )
    return config
