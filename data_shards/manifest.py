"""Table of contents of a dataset: `manifest.json` and its index `samples.parquet`.

The manifest is written last, so a dataset with a manifest is complete. It has the digests of the index and of every
shard, but no time, host or path: its own sha256 is the dataset's version.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_shards.fields import (
    MAX_CLASSES,
    PLANNED,
    Count,
    DatasetName,
    Sha256,
    ShardName,
    Share,
    SizeBytes,
    SplitName,
    explained,
)
from data_shards.index import (
    LEAST_ROW_BYTES,
    METADATA,
    SplitIndex,
    check_groups,
    index_problem,
    index_schema,
    known_labels,
    read_metadata,
    rows_of,
    split_index,
)
from data_shards.shard import Quarantined
from data_shards.split import SPLITS, LeakError
from data_shards.store import Store, StoreKeyError, open_store
from data_shards.store.bounded_table import TableError, read_bounded

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
INDEX = "samples.parquet"


class ManifestError(ValueError):
    """A manifest or index that is missing, truncated, edited or in another format."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ShardEntry(_Frozen):
    """One shard: `shards/<name>.tar`, its size in bytes, its sha256 and its number of samples."""

    name: ShardName
    bytes: SizeBytes
    sha256: Sha256
    count: Count


class SplitCounts(_Frozen):
    """Contents of one split; a multilabel sample counts for each of its classes."""

    samples: Count
    groups: Count
    classes: dict[str, Count]


class IndexEntry(_Frozen):
    """The index file, with its digest."""

    name: Literal["samples.parquet"] = "samples.parquet"
    bytes: SizeBytes
    sha256: Sha256


class Manifest(_Frozen):
    """Description of a dataset and the digests of its files."""

    format: Literal[1] = 1
    dataset: DatasetName
    task: Literal["multiclass", "ordinal", "multilabel"]
    classes: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    licence: str
    config_sha256: Sha256
    """Digest of the settings that affect the bytes (`plan.config_digest`)."""
    channels: Literal[1, 3]
    """3 if any image is RGB: batches then hold gray images as RGB too."""
    mean: tuple[Share, ...]
    """Mean of the train split's pixels per channel, in [0, 1]."""
    std: tuple[Share, ...]
    """Standard deviation of the train split's pixels per channel, in [0, 1]."""
    splits: dict[SplitName, SplitCounts]
    shards: tuple[ShardEntry, ...]
    quarantine: tuple[Quarantined, ...]
    index: IndexEntry

    @field_validator("classes")
    @classmethod
    def _classes_have_names(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) != len(classes) or "" in classes:
            raise ValueError("every class needs a name, and each name may appear only once")
        return classes

    @model_validator(mode="after")
    def _fits_together(self) -> Manifest:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, but each needs one per channel, and "
                f"channels is {self.channels}"
            )
        if strange := next((shard.name for shard in self.shards if not PLANNED.fullmatch(shard.name)), None):
            raise ValueError(f"a shard is named {strange}, but names have the form train-00000, val-00000, test-00000")
        for what, names in (
            ("shards", [shard.name for shard in self.shards]),
            ("quarantine", [image.key for image in self.quarantine]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{what} lists {next(n for n in names if names.count(n) > 1)} twice")
        return self


@dataclass(frozen=True, eq=False)
class Dataset:
    """A complete dataset in a store. Manifest and index are verified; shards are verified when they are opened."""

    store: Store
    manifest: Manifest
    digest: str
    table: pa.Table

    def index(self, split: str) -> SplitIndex:
        """The samples of a split.

        Raises:
            ValueError: the dataset has no such split.
        """
        return self._indexes[self._known(split)]

    def metadata(self, split: str) -> dict[str, np.ndarray]:
        """Column -> (n,) values of the samples of a split, in the order of `index(split)`.

        These are the columns of `data.metadata_columns`: integers, numbers, or objects (texts, and numbers of which
        some are missing), with None for a missing value. Empty if the dataset has no metadata.

        Raises:
            ManifestError: the metadata are damaged, or not those of exactly the samples of the index.
            ValueError: the dataset has no such split.
        """
        keys = self.index(split).key.tolist()
        found = {name: [values[key] for key in keys] for name, values in self._metadata.items()}
        return {
            name: np.array(values, object if any(isinstance(value, str | None) for value in values) else None)
            for name, values in found.items()
        }

    @functools.cached_property
    def _metadata(self) -> dict[str, dict[str, Any]]:
        try:
            return read_metadata(self.store.get(METADATA), self.table)
        except StoreKeyError:
            return {}
        except TableError as error:
            raise ManifestError(
                f"{self.store.uri}/{METADATA} is not the metadata of this dataset ({error}): delete {MANIFEST} there "
                f"{MAKE_AGAIN}"
            ) from error

    def _known(self, split: str) -> str:
        if split not in self.manifest.splits:
            raise ValueError(f"{self.store.uri} has no split {split!r}; it has {', '.join(self.manifest.splits)}")
        return split

    @functools.cached_property
    def _indexes(self) -> dict[str, SplitIndex]:
        names = [shard.name for shard in self.manifest.shards]
        return {
            split: split_index(rows_of(self.table, split), len(self.manifest.classes), names)
            for split in self.manifest.splits
        }


def manifest_digest(data: bytes) -> str:
    """The dataset's version: sha256 (hex) of the bytes of its `manifest.json`."""
    return hashlib.sha256(data).hexdigest()


def count_splits(table: pa.Table, classes: Sequence[str]) -> dict[str, SplitCounts]:
    """Number of samples, groups and images per class of every split.

    Raises:
        LeakError: a group is in two splits.
        ValueError: a class is missing from a split.
    """
    counts = {}
    for split in SPLITS:
        rows = rows_of(table, split)
        labels = np.bincount(rows["labels"].combine_chunks().flatten().to_numpy(), minlength=len(classes))
        missing = [name for name, count in zip(classes, labels, strict=True) if count == 0]
        if missing:
            raise ValueError(
                f"the split {split!r} has no image of {', '.join(missing)}, but every split needs every class; add "
                "images of it, leave the class out, or change the fractions or the seed of the splits"
            )
        counts[split] = SplitCounts(
            samples=len(rows),
            groups=len(rows["group"].unique()),
            classes={name: int(count) for name, count in zip(classes, labels, strict=True)},
        )
    check_groups(table)
    return counts


def channel_statistics(histogram_CV: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in [0, 1], from pixel counts (C, 256).

    Computed from integers, so the result does not depend on the order of the shards.
    """
    means, deviations = [], []
    for counts in histogram_CV.tolist():
        num = max(1, sum(counts))
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        means.append(total / (255 * num))
        deviations.append(math.sqrt((squares * num - total * total) / (num * num)) / 255)
    return tuple(means), tuple(deviations)


def open_dataset(store: Store | str, *, digest: str | None = None) -> Dataset:
    """The dataset in a store (rooted at `datasets/<dataset>/<name>`), with manifest and index verified.

    Args:
        store: The store or its uri.
        digest: The required version; None accepts any.

    Raises:
        ManifestError: the manifest or index is missing, truncated, edited, or of another format or version.
        LeakError: a group is in two splits.
    """
    store = open_store(store) if isinstance(store, str) else store
    data = _read(store, MANIFEST)
    found = manifest_digest(data)
    if digest is not None and found != digest:
        raise ManifestError(
            f"{store.uri}/{MANIFEST} has the digest {found}, but {digest} is required: the dataset has been rebuilt or "
            "edited since; use its current version, or restore the old one"
        )
    manifest = _parse(store, data)
    table = _verified_index(store, manifest)
    try:
        same = known_labels(table, len(manifest.classes)) and _same_shards(table, manifest)
        same = same and count_splits(table, manifest.classes) == manifest.splits
    except LeakError:
        raise
    except ValueError:  # a label out of range, or a class without images
        same = False
    if not same:
        raise ManifestError(f"{store.uri}/{MANIFEST} and its index have different sample counts: {_REMAKE}")
    return Dataset(store, manifest, found, table)


def read_classes(store: Store) -> tuple[str, ...]:
    """The class names of the dataset in a store, for messages; empty if its manifest cannot be read."""
    try:
        return Manifest.model_validate_json(store.get(MANIFEST)).classes
    except (StoreKeyError, ValidationError):
        return ()


# Under another --run, because a run skips a shard step that is already recorded.
MAKE_AGAIN = (
    "and rebuild the dataset: `medmamba shard` with the same settings under another --run keeps complete shards"
)
_REMAKE = f"it was edited or damaged; delete it {MAKE_AGAIN}"


def _read(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except StoreKeyError as error:
        raise ManifestError(
            f"{store.uri} has no {key}, which is written after all shards; run the shard step (with another --run if "
            "this one has already recorded it), or give the address of a finished dataset"
        ) from error


def _parse(store: Store, data: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise ManifestError(
            f"{store.uri}/{MANIFEST} is not a manifest of format 1 ({explained(error)}): {_REMAKE}"
        ) from error


def _verified_index(store: Store, manifest: Manifest) -> pa.Table:
    data = _read(store, INDEX)
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.index.sha256:
        raise ManifestError(
            f"{store.uri}/{INDEX} has the sha256 {found}, but its manifest says {manifest.index.sha256}: {_REMAKE}"
        )
    try:
        table = read_bounded(data, index_schema(), least_row_bytes=LEAST_ROW_BYTES, most_labels=len(manifest.classes))
        shard_bytes = {shard.name: shard.bytes for shard in manifest.shards}
        problem = index_problem(table, shard_bytes, most_channels=manifest.channels, task=manifest.task)
    except TableError as error:
        problem = str(error)
    if problem:
        raise ManifestError(f"{store.uri}/{INDEX} is not an index of format 1 ({problem}): {_REMAKE}")
    return table


def _same_shards(table: pa.Table, manifest: Manifest) -> bool:
    found = {pair["values"]: pair["counts"] for pair in table["shard"].value_counts().to_pylist()}
    return found == {shard.name: shard.count for shard in manifest.shards if shard.count}
