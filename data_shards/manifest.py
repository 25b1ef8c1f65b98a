"""Table of contents of a dataset: `manifest.json` and its index `samples.parquet`.

The manifest is written last, so a dataset with a manifest is whole. It holds the digest of the index and of every
shard, and no time, host or path: its own sha256 is the dataset's version everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_shards.bounded_table import TableError, read_bounded
from data_shards.decode import MAX_PIXELS
from data_shards.fields import (
    KEY,
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
from data_shards.shard import FIRST_OFFSET, Quarantined, ShardPart
from data_shards.split import SPLITS, LeakError
from data_shards.store import Store, StoreKeyError, open_store

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


@dataclass(frozen=True)
class SplitIndex:
    """The samples of one split, column by column, in the order of their shards. n samples, C classes."""

    key: np.ndarray  # (n,) str of 20 hex digits
    group: np.ndarray  # (n,) str of 20 hex digits
    labels: np.ndarray  # (n, C) uint8, 1 where the sample is of the class
    shard: np.ndarray  # (n,) int64, position in the manifest's `shards`
    offset: np.ndarray  # (n,) int64, first byte of the coded image in its shard
    size: np.ndarray  # (n,) int64, bytes of the coded image
    height: np.ndarray  # (n,) int64, pixels
    width: np.ndarray  # (n,) int64, pixels
    channels: np.ndarray  # (n,) int64, 1 or 3

    def __len__(self) -> int:
        return len(self.key)


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
            split: _columns(_rows_of(self.table, split), len(self.manifest.classes), names)
            for split in self.manifest.splits
        }


def manifest_digest(data: bytes) -> str:
    """The dataset's version: sha256 (hex) of the bytes of its `manifest.json`."""
    return hashlib.sha256(data).hexdigest()


def index_table(part: ShardPart) -> pa.Table:
    """The rows of one shard in the index."""
    import pyarrow as pa

    columns = {name: [getattr(sample, name) for sample in part.samples] for name in _schema().names if name in _SAMPLE}
    columns |= {"split": [part.split] * len(part.samples), "shard": [part.name] * len(part.samples)}
    return pa.table(columns, schema=_schema())


def index_bytes(table: pa.Table) -> bytes:
    """The index as Parquet; the same rows give the same bytes with the same pyarrow (its version is in the footer)."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", version="2.6", row_group_size=1 << 16, store_schema=False)
    return buffer.getvalue()


def count_splits(table: pa.Table, classes: Sequence[str]) -> dict[str, SplitCounts]:
    """Samples, groups and classes of every split.

    Raises:
        LeakError: a group stands in two splits.
        ValueError: a class is missing from a split.
    """
    counts = {}
    for split in SPLITS:
        rows = _rows_of(table, split)
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
    _check_groups(table)
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
        same = _known_labels(table, manifest) and _same_shards(table, manifest)
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
_LEAST_ROW_BYTES = 8  # a key is 80 random bits
_SAMPLE = {"key", "labels", "group", "offset", "size", "height", "width", "channels"}


def _schema() -> pa.Schema:
    import pyarrow as pa

    whole = {name: pa.int64() for name in ("offset", "size", "height", "width", "channels")}
    text = {name: pa.string() for name in ("key", "group", "split", "shard")}
    kinds = {**text, "labels": pa.list_(pa.int32()), **whole}
    order = ("key", "labels", "group", "split", "shard", "offset", "size", "height", "width", "channels")
    return pa.schema([pa.field(name, kinds[name], nullable=False) for name in order])


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
        table = read_bounded(data, _schema(), least_row_bytes=_LEAST_ROW_BYTES, most_labels=len(manifest.classes))
        problem = _problem(table, manifest)
    except TableError as error:
        problem = str(error)
    if problem:
        raise ManifestError(f"{store.uri}/{INDEX} is not an index of format 1 ({problem}): {_REMAKE}")
    return table


def _problem(table: pa.Table, manifest: Manifest) -> str:
    """The first column whose values cannot be those of a dataset with this manifest, and the rule; "" for none.

    Offsets, sizes and shapes are read and allocated by, so each must fit its shard and what `decode` accepts.
    """
    import pyarrow.compute as pc

    for name in ("key", "group"):
        fits = pc.match_substring_regex(table[name], rf"^{KEY.pattern}$").to_numpy()
        if not fits.all():
            return f"{name} of sample {int(np.argmin(fits))} is not 20 hex digits"
    if len(table["key"].unique()) != len(table):
        return "a key is listed twice"
    by_name = {shard.name: shard for shard in manifest.shards}
    named = table["shard"].combine_chunks().dictionary_encode()
    names = named.dictionary.to_pylist()
    if any(name not in by_name for name in names):
        return ""  # told as another count of samples than the manifest's
    limit = np.array([by_name[name].bytes for name in names], np.int64)[named.indices.to_numpy()]
    home = np.array([name.partition("-")[0] for name in names])[named.indices.to_numpy()]
    offset, size, height, width, channels = (
        table[name].to_numpy() for name in ("offset", "size", "height", "width", "channels")
    )
    lengths = pc.list_value_length(table["labels"]).to_numpy()
    rules = {
        "split": (home == table["split"].to_numpy(), "is not that of its shard"),
        "size": ((size >= 1) & (size <= limit), "is not within its shard"),
        "offset": ((offset >= FIRST_OFFSET) & (offset <= limit - size), "is not within its shard"),
        "height": ((height >= 1) & (height <= MAX_PIXELS), f"is not between 1 and {MAX_PIXELS}"),
        "width": (
            (width >= 1) & (width <= MAX_PIXELS // np.maximum(height, 1)),
            f"makes no pixels or over {MAX_PIXELS}",
        ),
        "channels": (
            ((channels == 1) | (channels == 3)) & (channels <= manifest.channels),
            f"is not 1 or 3, or above the manifest's {manifest.channels}",
        ),
        "labels": ((lengths == 1) | (manifest.task == "multilabel"), f"are not one, as {manifest.task} has it"),
    }
    for name, (fits, rule) in rules.items():
        if not fits.all():
            return f"{name} of sample {int(np.argmin(fits))} {rule}"
    return ""


def _known_labels(table: pa.Table, manifest: Manifest) -> bool:
    """Whether each label is the index of a class, and no sample has one twice."""
    import pyarrow.compute as pc

    lists = table["labels"].combine_chunks()
    flat = lists.flatten()
    if flat.null_count:
        return False
    labels, num = flat.to_numpy().astype(np.int64), len(manifest.classes)
    if ((labels < 0) | (labels >= num)).any():
        return False
    rows = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    return len(np.unique(rows * num + labels)) == len(labels)


def _same_shards(table: pa.Table, manifest: Manifest) -> bool:
    found = {pair["values"]: pair["counts"] for pair in table["shard"].value_counts().to_pylist()}
    return found == {shard.name: shard.count for shard in manifest.shards if shard.count}


def _rows_of(table: pa.Table, split: str) -> pa.Table:
    import pyarrow.compute as pc

    return table.filter(pc.equal(table["split"], split))


def _check_groups(table: pa.Table) -> None:
    import pyarrow.compute as pc

    pairs = table.select(["group", "split"]).group_by("group").aggregate([("split", "count_distinct")])
    counts = pairs["split_count_distinct"].to_numpy()
    if (counts > 1).any():
        group = pairs["group"][int(np.argmax(counts > 1))].as_py()
        splits = table.filter(pc.equal(table["group"], group))["split"].unique().to_pylist()
        raise LeakError(
            f"group {group} stands in the splits {' and '.join(splits)}: a group must stand in one split only; mend "
            "the split column, or draw the splits by group"
        )


def _columns(rows: pa.Table, num_classes: int, shard_names: list[str]) -> SplitIndex:
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = rows["labels"].combine_chunks()
    labels = np.zeros((len(rows), num_classes), np.uint8)
    labels[pc.list_parent_indices(lists).to_numpy(), lists.flatten().to_numpy()] = 1
    shard = pc.index_in(rows["shard"], pa.array(shard_names)).to_numpy().astype(np.int64)
    numbers = {name: rows[name].to_numpy() for name in ("offset", "size", "height", "width", "channels")}
    text = {name: np.array(rows[name].to_pylist(), dtype="<U20") for name in ("key", "group")}
    return SplitIndex(labels=labels, shard=shard, **numbers, **text)
