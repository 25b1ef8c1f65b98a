"""An image set as rows: where an image lies, its labels, and, where known, its split and group.

`open_source` reads only names and labels; pixels and coded bytes come one row at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_shards import catalog
from data_shards.config import DataConfig, PhantomConfig
from data_shards.labels import check_settings
from data_shards.source import phantoms
from data_shards.store import open_store

# As a setting: no such column, whatever the catalogue says.
NO_COLUMN = "-"
# What a card says of its table, where the configuration leaves it open.
_OF_TABLES = ("csv", "image_column", "label_column", "group_column", "split_column", "split_values")


@dataclass(frozen=True, slots=True)
class Row:
    """One image. `where` is its path inside the set; `labels` are class indices; unknown split and group are None."""

    where: str
    frame: int
    labels: tuple[int, ...]
    split: str | None
    group: str | None


class ImageSet(Protocol):
    """What a source gives: its rows in an order that depends on the set alone, and the image of each."""

    classes: tuple[str, ...]
    task: str
    notes: tuple[str, ...]
    """What its owner should be told of it, a sentence each: file names may stand there."""
    splits_from: str
    """Where its splits come from, in a clause without file names; empty where there is nothing to say."""

    @property
    def rows(self) -> list[Row]: ...

    def read(self, row: Row) -> bytes | np.ndarray:
        """The image: coded bytes, or uint8 pixels (H, W) or (H, W, C)."""
        ...

    def inside(self, row: Row) -> str:
        """Where the row's file is inside the source, as its owner finds it there."""
        ...

    def stamp(self, row: Row) -> str:
        """A text that changes when the row's file is replaced, found without reading it; "" where that is unknown."""
        ...


def open_source(config: DataConfig) -> ImageSet:
    """The image set that `config` describes.

    Raises ValueError with the value, the rule and a remedy: unknown dataset, no such source, an empty class folder, a
    table without a column, a row without its file, a label out of range, a damaged file.
    """
    classes_named = bool(config.classes)
    config = resolved(config)
    check_settings(config)
    if config.layout == "phantoms":
        return PhantomSet(config.phantoms, config.seed)
    _require_source(config)
    if config.layout == "npz":
        from data_shards.source.npz import NpzSet

        return NpzSet(config)
    if config.layout == "csv":
        from data_shards.source.table.rows import open_csv

        return open_csv(config, classes_named=classes_named)
    from data_shards.source.folders.rows import open_folders

    return open_folders(config)


def check_source(config: DataConfig) -> None:
    """ValueError where the set's files are not named or not there, or a setting does not fit: before any work."""
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
    """ValueError where neither an object of that name nor one below it is there."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    named = folder != "s3:/" and open_store(folder).head(name) is not None
    if not named and next(iter(open_store(uri).list()), None) is None:
        raise ValueError(f"{uri} was not found: there is no object; check --data.source")


def _require_source(config: DataConfig) -> None:
    if not config.source:
        address = catalog.card(config.dataset).source if config.dataset in catalog.names() else ""
        raise ValueError(
            f"dataset {config.dataset!r} needs its files: {f'get them ({address}) and ' if address else ''}"
            "say where they lie with --data.source"
        )


def resolved(config: DataConfig) -> DataConfig:
    """The config with everything that it leaves to the catalogue filled in.

    Raises ValueError for a dataset that is neither in the catalogue nor given a layout.
    """
    if config.layout == "folders" and config.split_column == NO_COLUMN:  # as one declines the column of a table
        config = config.model_copy(update={"split_folders": "ignore"})
    if config.dataset not in catalog.names() and config.layout not in ("catalog", "phantoms"):
        own = {"task": "multiclass"} if config.task == "catalog" else {}
        return config.model_copy(update=own | ({"split_column": ""} if config.split_column == NO_COLUMN else {}))
    card = catalog.card(config.dataset)
    update: dict[str, Any] = {
        field: getattr(card, field) for field in ("layout", "task") if getattr(config, field) == "catalog"
    }
    columns = _OF_TABLES if card.layout == "csv" and config.layout in ("catalog", "csv") else ()
    update |= {field: getattr(card, field) for field in ("classes", *columns) if not getattr(config, field)}
    if config.split_column == NO_COLUMN:
        update |= {"split_column": ""}
    if config.group_pattern:
        update |= {"group_column": ""}
    config = config.model_copy(update=update)
    if config.layout == "phantoms" and config.classes != phantoms.CLASSES:
        raise ValueError(f"classes are {config.classes}, but phantoms are {phantoms.CLASSES}: leave --data.classes out")
    return config


class PhantomSet:
    """The synthetic images; a patient is a group."""

    def __init__(self, config: PhantomConfig, seed: int):
        self._config, self._seed = config, seed
        self.classes: tuple[str, ...] = phantoms.CLASSES
        self.task: str = "multiclass"
        self.notes: tuple[str, ...] = ()
        self.splits_from = ""
        self.rows = [
            Row(f"patient{patient:05d}", image, (phantoms.diagnosis(patient),), None, f"patient{patient:05d}")
            for patient in range(config.num_patients)
            for image in range(config.images_per_patient)
        ]

    def read(self, row: Row) -> np.ndarray:
        """uint8 (side, side)."""
        return phantoms.phantom(self._config, self._seed, int(row.where.removeprefix("patient")), row.frame)

    def inside(self, row: Row) -> str:
        """See ImageSet; there is no file."""
        return row.where

    def stamp(self, row: Row) -> str:
        """See ImageSet: a phantom is a function of its settings."""
        return f"{self._config.model_dump_json()}|{self._seed}|{row.where}"
