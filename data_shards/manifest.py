"""Table of contents of a dataset: `manifest.json` and its index `samples.parquet`.

The manifest is written last, so a dataset with a manifest is whole. It holds the digest of the index and of every
shard, and no time, host or path: its own sha256 is the dataset's version everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
    SplitIndex,
    check_groups,
    index_problem,
    index_schema,
    known_labels,
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
    """A manifest or index that is missing, torn, edited or of another format."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ShardEntry(_Frozen):
    """One shard: `shards/<name>.tar`, its size in bytes, its digest and how many samples it holds."""

    name: ShardName
    bytes: SizeBytes
    sha256: Sha256
    count: Count


class SplitCounts(_Frozen):
    """What one split holds; a multilabel sample counts for each of its classes."""

    samples: Count
    groups: Count
    classes: dict[str, Count]


class IndexEntry(_Frozen):
    """The index beside the manifest, by its digest."""

    name: Literal["samples.parquet"] = "samples.parquet"
    bytes: SizeBytes
    sha256: Sha256


class Manifest(_Frozen):
    """What a dataset is and of which bytes it consists."""

    format: Literal[1] = 1
    dataset: DatasetName
    task: Literal["multiclass", "ordinal", "multilabel"]
    classes: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    licence: str
    config_sha256: Sha256
    """Digest of the settings that decided the bytes (`plan.config_digest`)."""
    channels: Literal[1, 3]
    """3 if any image is RGB: batches then hold grey ones as RGB too."""
    mean: tuple[Share, ...]
    """Of the train split's pixels, per channel, where white is 1."""
    std: tuple[Share, ...]
    """Standard deviation of the same."""
    splits: dict[SplitName, SplitCounts]
    shards: tuple[ShardEntry, ...]
    quarantine: tuple[Quarantined, ...]
    index: IndexEntry

    @field_validator("classes")
    @classmethod
    def _classes_have_names(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) != len(classes) or "" in classes:
            raise ValueError("each class has a name, and each name is given once")
        return classes

    @model_validator(mode="after")
    def _fits_together(self) -> Manifest:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, but there is one of each per channel, "
                f"and channels is {self.channels}"
            )
        if strange := next((shard.name for shard in self.shards if not PLANNED.fullmatch(shard.name)), None):
            raise ValueError(
                f"a shard is named {strange}, but names are of the form train-00000, val-00000, test-00000"
            )
        for what, names in (
            ("shards", [shard.name for shard in self.shards]),
            ("quarantine", [image.key for image in self.quarantine]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{what} lists {next(n for n in names if names.count(n) > 1)} twice")
        return self


@dataclass(frozen=True, eq=False)
class Dataset:
    """A whole dataset in a store, its manifest and index verified; the shards are verified when they are opened."""

    store: Store
    manifest: Manifest
    digest: str
    table: pa.Table

    def index(self, split: str) -> SplitIndex:
        """The samples of a split.

        Raises:
            ValueError: there is no such split.
        """
        return self._indexes[self._known(split)]

    def _known(self, split: str) -> str:
        if split not in self.manifest.splits:
            raise ValueError(f"{split!r} is no split of {self.store.uri}: it has {', '.join(self.manifest.splits)}")
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
    """Samples, groups and classes of every split.

    Raises:
        LeakError: a group stands in two splits.
        ValueError: a class is missing from a split.
    """
    counts = {}
    for split in SPLITS:
        rows = rows_of(table, split)
        labels = np.bincount(rows["labels"].combine_chunks().flatten().to_numpy(), minlength=len(classes))
        missing = [name for name, count in zip(classes, labels, strict=True) if count == 0]
        if missing:
            raise ValueError(
                f"the split {split!r} holds no image of {', '.join(missing)}, but every class must stand in every "
                "split: add images of it, leave the class out, or change the fractions or the seed of the splits"
            )
        counts[split] = SplitCounts(
            samples=len(rows),
            groups=len(rows["group"].unique()),
            classes={name: int(count) for name, count in zip(classes, labels, strict=True)},
        )
    check_groups(table)
    return counts


def channel_statistics(histogram_CV: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in [0, 1], from how many pixels have each of the 256 values.

    From whole numbers, so they do not depend on the order in which shards were made.
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
    """The dataset in a store (rooted at `datasets/<dataset>/<name>`), manifest and index verified.

    Args:
        store: The store or its uri.
        digest: The version that is wanted; None takes whatever lies there.

    Raises:
        ManifestError: the manifest or index is missing, torn, edited, of another format or of another version.
        LeakError: a group stands in two splits.
    """
    store = open_store(store) if isinstance(store, str) else store
    data = _read(store, MANIFEST)
    found = manifest_digest(data)
    if digest is not None and found != digest:
        raise ManifestError(
            f"{store.uri}/{MANIFEST} has the digest {found}, but {digest} is wanted: the dataset was made anew or "
            "edited since; use the dataset's present version, or restore the old one"
        )
    manifest = _parse(store, data)
    table = _verified_index(store, manifest)
    try:
        same = known_labels(table, len(manifest.classes)) and _same_shards(table, manifest)
        same = same and count_splits(table, manifest.classes) == manifest.splits
    except LeakError:
        raise
    except ValueError:  # a label that is none of the classes, or a class without images
        same = False
    if not same:
        raise ManifestError(f"{store.uri}/{MANIFEST} counts other samples than its index holds: {_REMAKE}")
    return Dataset(store, manifest, found, table)


def read_classes(store: Store) -> tuple[str, ...]:
    """The class names of the dataset in a store, for messages: none where its manifest cannot be read."""
    try:
        return Manifest.model_validate_json(store.get(MANIFEST)).classes
    except (StoreKeyError, ValidationError):
        return ()


# Under another --run, because a run whose shard step has a record does not make it again.
MAKE_AGAIN = (
    "and make the dataset again: `medmamba shard` with the same settings under another --run keeps whole shards"
)
_REMAKE = f"it was edited or damaged; delete it {MAKE_AGAIN}"


def _read(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except StoreKeyError as error:
        raise ManifestError(
            f"there is no {key} in {store.uri}: a dataset has one once all its shards are written; run the shard "
            "step (under another --run where this one has it on record), or give the address of a finished dataset"
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
            f"{store.uri}/{INDEX} has the sha256 {found}, but {manifest.index.sha256} is in its manifest: {_REMAKE}"
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
