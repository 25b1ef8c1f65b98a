"""The index of a dataset, `samples.parquet`: one row per sample, with the location of its image.

`metadata.parquet` beside it has the columns of a source's table that are kept for figures by subgroup.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.decode import MAX_PIXELS
from data_shards.fields import KEY
from data_shards.shard import FIRST_OFFSET, ShardPart
from data_shards.source.row import Row
from data_shards.split import LeakError
from data_shards.store import Store
from data_shards.store.bounded_table import TableError, read_bounded

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = "metadata.parquet"
LEAST_ROW_BYTES = 8  # a key is 80 random bits
LONGEST_VALUE = 256
"""Bytes of a text of metadata."""
_MOST_COLUMNS = 1000
_SAMPLE = {"key", "labels", "group", "offset", "size", "height", "width", "channels"}


@dataclass(frozen=True)
class SplitIndex:
    """The samples of one split, column by column, in the order of their shards. n samples, C classes."""

    key: np.ndarray  # (n,) str of 20 hex digits
    group: np.ndarray  # (n,) str of 20 hex digits
    labels: np.ndarray  # (n, C) uint8, 1 where the sample is of the class
    shard: np.ndarray  # (n,) int64, position in the manifest's `shards`
    offset: np.ndarray  # (n,) int64, first byte of the encoded image in its shard
    size: np.ndarray  # (n,) int64, bytes of the encoded image
    height: np.ndarray  # (n,) int64, pixels
    width: np.ndarray  # (n,) int64, pixels
    channels: np.ndarray  # (n,) int64, 1 or 3

    def __len__(self) -> int:
        return len(self.key)


def index_table(part: ShardPart) -> pa.Table:
    """The index rows of one shard."""
    import pyarrow as pa

    columns = {
        name: [getattr(sample, name) for sample in part.samples] for name in index_schema().names if name in _SAMPLE
    }
    columns |= {"split": [part.split] * len(part.samples), "shard": [part.name] * len(part.samples)}
    return pa.table(columns, schema=index_schema())


def index_bytes(table: pa.Table) -> bytes:
    """The index as Parquet. Equal rows give equal bytes with the same pyarrow, whose version is in the footer."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", version="2.6", row_group_size=1 << 16, store_schema=False)
    return buffer.getvalue()


def index_schema() -> pa.Schema:
    """Names and types of the columns."""
    import pyarrow as pa

    numbers = {name: pa.int64() for name in ("offset", "size", "height", "width", "channels")}
    text = {name: pa.string() for name in ("key", "group", "split", "shard")}
    kinds = {**text, "labels": pa.list_(pa.int32()), **numbers}
    order = ("key", "labels", "group", "split", "shard", "offset", "size", "height", "width", "channels")
    return pa.schema([pa.field(name, kinds[name], nullable=False) for name in order])


def index_problem(table: pa.Table, shard_bytes: Mapping[str, int], *, most_channels: int, task: str) -> str:
    """The first column with an impossible value for these shards, and the rule; "" if all are valid.

    Offsets, sizes and shapes control reads and allocations, so each must fit its shard and the limits of `decode`.
    """
    import pyarrow.compute as pc

    for name in ("key", "group"):
        fits = pc.match_substring_regex(table[name], rf"^{KEY.pattern}$").to_numpy()
        if not fits.all():
            return f"{name} of sample {int(np.argmin(fits))} is not 20 hex digits"
    if len(table["key"].unique()) != len(table):
        return "a key is listed twice"
    named = table["shard"].combine_chunks().dictionary_encode()
    names = named.dictionary.to_pylist()
    if any(name not in shard_bytes for name in names):
        return ""  # reported when the sample counts are compared with the manifest
    limit = np.array([shard_bytes[name] for name in names], np.int64)[named.indices.to_numpy()]
    home = np.array([name.partition("-")[0] for name in names])[named.indices.to_numpy()]
    offset, size, height, width, channels = (
        table[name].to_numpy() for name in ("offset", "size", "height", "width", "channels")
    )
    lengths = pc.list_value_length(table["labels"]).to_numpy()
    rules = {
        "split": (home == table["split"].to_numpy(), "differs from that of its shard"),
        "size": ((size >= 1) & (size <= limit), "is not within its shard"),
        "offset": ((offset >= FIRST_OFFSET) & (offset <= limit - size), "is not within its shard"),
        "height": ((height >= 1) & (height <= MAX_PIXELS), f"is not between 1 and {MAX_PIXELS}"),
        "width": (
            (width >= 1) & (width <= MAX_PIXELS // np.maximum(height, 1)),
            f"gives no pixels or more than {MAX_PIXELS}",
        ),
        "channels": (
            ((channels == 1) | (channels == 3)) & (channels <= most_channels),
            f"is not 1 or 3, or above the manifest's {most_channels}",
        ),
        "labels": ((lengths == 1) | (task == "multilabel"), f"are not exactly one, as {task} needs"),
    }
    for name, (fits, rule) in rules.items():
        if not fits.all():
            return f"{name} of sample {int(np.argmin(fits))} {rule}"
    return ""


def known_labels(table: pa.Table, num_classes: int) -> bool:
    """Whether each label is the index of a class, and no sample has the same label twice."""
    import pyarrow.compute as pc

    lists = table["labels"].combine_chunks()
    flat = lists.flatten()
    if flat.null_count:
        return False
    labels = flat.to_numpy().astype(np.int64)
    if ((labels < 0) | (labels >= num_classes)).any():
        return False
    rows = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    return len(np.unique(rows * num_classes + labels)) == len(labels)


def rows_of(table: pa.Table, split: str) -> pa.Table:
    """The index rows of a split."""
    import pyarrow.compute as pc

    return table.filter(pc.equal(table["split"], split))


def check_groups(table: pa.Table) -> None:
    """LeakError if a group is in two splits."""
    import pyarrow.compute as pc

    pairs = table.select(["group", "split"]).group_by("group").aggregate([("split", "count_distinct")])
    counts = pairs["split_count_distinct"].to_numpy()
    if (counts > 1).any():
        group = pairs["group"][int(np.argmax(counts > 1))].as_py()
        splits = table.filter(pc.equal(table["group"], group))["split"].unique().to_pylist()
        raise LeakError(
            f"group {group} is in the splits {' and '.join(splits)}, but must be in only one; fix the split column, or "
            "draw the splits by group"
        )


def split_index(rows: pa.Table, num_classes: int, shard_names: list[str]) -> SplitIndex:
    """The index rows of one split as arrays."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = rows["labels"].combine_chunks()
    labels = np.zeros((len(rows), num_classes), np.uint8)
    labels[pc.list_parent_indices(lists).to_numpy(), lists.flatten().to_numpy()] = 1
    shard = pc.index_in(rows["shard"], pa.array(shard_names)).to_numpy().astype(np.int64)
    numbers = {name: rows[name].to_numpy() for name in ("offset", "size", "height", "width", "channels")}
    text = {name: np.array(rows[name].to_pylist(), dtype="<U20") for name in ("key", "group")}
    return SplitIndex(labels=labels, shard=shard, **numbers, **text)


def write_metadata(
    out: Store, names: Sequence[str], keys: Sequence[str], rows: Sequence[Row], *, without: Collection[str]
) -> None:
    """Writes `metadata.parquet`: key, and these columns, each of integers, numbers or texts; null where missing.

    Args:
        out: The dataset's store.
        names: Names of the columns; without any, the file of an earlier attempt is removed.
        keys: Of the rows.
        rows: With their `metadata`.
        without: Keys of rows that are not in the dataset, because they are quarantined.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not names:
        out.delete(METADATA)
        return
    kept = [i for i, key in enumerate(keys) if key not in without]
    columns = {"key": pa.array([keys[i] for i in kept], pa.string())}
    for position, name in enumerate(names):
        values = pa.array([rows[i].metadata[position] for i in kept])
        columns[name] = values.cast(pa.string()) if pa.types.is_null(values.type) else values
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd", version="2.6", store_schema=False)
    out.ensure(METADATA, buffer.getvalue())


def read_metadata(data: bytes, table: pa.Table) -> dict[str, dict[str, Any]]:
    """Column -> key -> value, of the samples of an index `table`.

    Raises:
        TableError: these bytes are not the metadata of exactly these samples.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise TableError(" ".join(str(error).split())[:120]) from error
    names = schema.names
    if names[:1] != ["key"] or len(set(names)) != len(names) or len(names) > _MOST_COLUMNS:
        raise TableError("its columns are not a key and differently named others")
    if strange := [name for name in names if schema.field(name).type not in (pa.string(), pa.int64(), pa.float64())]:
        raise TableError(f"its column {strange[0]!a} is neither of texts nor of numbers")
    room = len(names) * LONGEST_VALUE // 8
    found = read_bounded(
        data, schema, least_row_bytes=LEAST_ROW_BYTES, most_labels=room, longest_text=LONGEST_VALUE
    ).to_pydict()
    keys = found.pop("key")
    if len(set(keys)) != len(keys) or set(keys) != set(table["key"].to_pylist()):
        raise TableError("its keys are not those of the index")
    return {name: dict(zip(keys, values, strict=True)) for name, values in found.items()}
