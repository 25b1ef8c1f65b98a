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
from pydantic import BaseModel, ConfigDict, ValidationError

from data_shards.shard import Quarantined, ShardPart
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

    name: str
    bytes: int
    sha256: str
    count: int


class SplitCounts(_Frozen):
    """What one split holds; a multilabel sample counts for each of its classes."""

    samples: int
    groups: int
    classes: dict[str, int]


class IndexEntry(_Frozen):
    """The index beside the manifest, by its digest."""

    name: Literal["samples.parquet"] = "samples.parquet"
    bytes: int
    sha256: str


class Manifest(_Frozen):
    """What a dataset is and of which bytes it consists."""

    format: Literal[1] = 1
    dataset: str
    task: Literal["multiclass", "ordinal", "multilabel"]
    classes: tuple[str, ...]
    licence: str
    config_sha256: str
    """Digest of the settings that decided the bytes (`plan.config_digest`)."""
    channels: Literal[1, 3]
    """3 if any image is RGB: batches then hold grey ones as RGB too."""
    mean: tuple[float, ...]
    """Of the train split's pixels, per channel, where white is 1."""
    std: tuple[float, ...]
    """Standard deviation of the same."""
    splits: dict[str, SplitCounts]
    shards: tuple[ShardEntry, ...]
    quarantine: tuple[Quarantined, ...]
    index: IndexEntry


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
        same = count_splits(table, manifest.classes) == manifest.splits and _same_shards(table, manifest)
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
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its JSON"
        raise ManifestError(
            f"{store.uri}/{MANIFEST} is no manifest of format 1 ({where}: {first['msg']}): {_REMAKE}"
        ) from error


def _verified_index(store: Store, manifest: Manifest) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _read(store, INDEX)
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.index.sha256:
        raise ManifestError(
            f"{store.uri}/{INDEX} has the sha256 {found}, but {manifest.index.sha256} is in its manifest: {_REMAKE}"
        )
    try:
        table = pq.read_table(io.BytesIO(data))
        if table.schema.equals(_schema()):
            table.validate(full=True)
            return table
        problem = f"its columns are {', '.join(table.schema.names)}"
    except (pa.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())[:120]
    raise ManifestError(f"{store.uri}/{INDEX} is no index of format 1 ({problem}): {_REMAKE}")


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
