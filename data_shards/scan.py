"""The look at every image before shards are planned: in chunks that any process can do, and that a killed run keeps.

Of a finished dataset the fingerprints lie beside its index, so that other datasets can be compared with it.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_shards.bounded_table import TableError, read_bounded
from data_shards.fields import KEY, MAX_CLASSES
from data_shards.fingerprint import SHARP, Fingerprints, fingerprint
from data_shards.leakage import OtherDataset
from data_shards.manifest import MAKE_AGAIN, MANIFEST, ManifestError
from data_shards.plan import digest_of
from data_shards.source import ImageSet, Row
from data_shards.split import SPLITS
from data_shards.store import Store, StoreKeyError, open_store

if TYPE_CHECKING:
    import pyarrow as pa

FINGERPRINTS = "fingerprints.parquet"
FOLDER = "scan/"
# Of a chunk of N images: type, and shape without N.
_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "state": ("u1", ()),
    "pixels": ("<u8", (2,)),
    "bits": ("<u8", (3,)),
    "size": ("<i8", ()),
}
_WORTH_KEEPING_S = 2.0  # a chunk that took less is sooner done again than fetched


def chunks(num: int) -> list[tuple[int, int]]:
    """Rows [start, end) of each task: enough tasks for many workers, of at most 4,096 images."""
    step = min(4096, max(32, -(-num // 64)))
    return [(start, min(start + step, num)) for start in range(0, num, step)]


def scan_chunk(
    image_set: ImageSet, start: int, rows: Sequence[Row], *, max_side: int | None, settings: str, out: Store
) -> Fingerprints:
    """The fingerprints of rows that begin at `start`: those that an earlier run left in the store, or made now."""
    digest = digest_of([settings, [(row.where, row.frame) for row in rows]])
    key = f"{FOLDER}{start:09d}-{digest[:20]}.npz"
    kept = _kept(key, out, len(rows))
    # Where an image could not be decoded it may have been mended since.
    if kept is not None and kept.state.all():
        return kept
    began = time.monotonic()
    found = fingerprint(image_set, rows, max_side=max_side)
    if time.monotonic() - began > _WORTH_KEEPING_S:
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(found, name) for name in _COLUMNS})
        out.put(key, buffer.getvalue())
    return found


def _kept(key: str, out: Store, num: int) -> Fingerprints | None:
    """What an earlier run left of `num` rows; None where it is anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(out.get(key))) as archive:
            columns = [_column(archive, name, num) for name in _COLUMNS]
    except (StoreKeyError, ValueError, KeyError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    kept = Fingerprints(*columns)
    return kept if (kept.state <= SHARP).all() and (kept.size >= 0).all() else None


def _column(archive: zipfile.ZipFile, name: str, num: int) -> np.ndarray:
    """One array of the archive. np.load would take memory for whatever shape a header claims."""
    dtype, shape = np.dtype(_COLUMNS[name][0]), (num, *_COLUMNS[name][1])
    with archive.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is not an array of format 1.0")
        found = np.lib.format.read_array_header_1_0(file)
        if found != (shape, False, dtype):
            raise ValueError(f"{name} is {found}, not {shape} {dtype}")
        data = file.read(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape).copy()


def fingerprints_bytes(keys: Sequence[str], rows: Sequence[Row], splits: Sequence[str], prints: Fingerprints) -> bytes:
    """The fingerprints of a dataset's images as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fixed(words: np.ndarray) -> pa.Array:
        width = 8 * words.shape[1]
        data = pa.py_buffer(np.ascontiguousarray(words, "<u8"))
        return pa.Array.from_buffers(pa.binary(width), len(words), [None, data])

    labels = pa.array([row.labels for row in rows], pa.list_(pa.int32()))
    table = pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "split": pa.array(splits, pa.string()),
            "labels": labels,
            "state": pa.array(prints.state),
            "pixels": fixed(prints.pixels),
            "bits": fixed(prints.bits),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", version="2.6", store_schema=False)
    return buffer.getvalue()


def stored_digests(out: Store) -> dict[str, bytes]:
    """The digest of its pixels for every key of a finished dataset. ManifestError where they are missing or damaged."""
    table = _table(out)
    return dict(zip(table["key"].to_pylist(), table["pixels"].to_pylist(), strict=True))


def _table(out: Store) -> pa.Table:
    """The fingerprints beside a finished dataset, each value of the kind and range that `fingerprints_bytes` writes."""
    try:
        table = read_bounded(out.get(FINGERPRINTS), _schema(), least_row_bytes=16, most_labels=MAX_CLASSES)
        problem = _problem(table)
    except (StoreKeyError, TableError) as error:
        problem = " ".join(str(error).split())[:120]
    if problem:
        raise ManifestError(f"{out.uri} has no whole {FINGERPRINTS} ({problem}): delete {MANIFEST} there {MAKE_AGAIN}")
    return table


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = {"key": pa.string(), "split": pa.string(), "labels": pa.list_(pa.int32()), "state": pa.uint8()}
    return pa.schema({**kinds, "pixels": pa.binary(16), "bits": pa.binary(24)})


def _problem(table: pa.Table) -> str:
    """The first column that holds what no fingerprints do, and the rule; "" for none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if any(table[name].null_count for name in table.schema.names) or len(table) == 0:
        return "a value is missing, or there are no images"
    labels = table["labels"].combine_chunks().flatten()
    rules = {
        "key": (pc.all(pc.match_substring_regex(table["key"], f"^{KEY.pattern}$")), "is not 20 hex digits"),
        "split": (pc.all(pc.is_in(table["split"], pa.array(SPLITS))), f"is not one of {', '.join(SPLITS)}"),
        "state": (pc.less_equal(pc.max(table["state"]), SHARP), f"is above {SHARP}"),
        "labels": (pc.all(pc.greater_equal(labels, 0)), "are below 0"),
    }
    for name, (holds, rule) in rules.items():
        if holds.as_py() is False:
            return f"{name} {rule}"
    return "" if not labels.null_count else "a label is missing"


def other_datasets(out: Store, dataset: str) -> Iterator[OtherDataset]:
    """The other finished datasets of the store in which `out` is datasets/<dataset>/<name>.

    Other conversions of the same images are none of them. ManifestError where the fingerprints of one are damaged.
    """
    root, _, rest = out.uri.rpartition(f"/datasets/{dataset}/")
    if not root or "/" in rest:
        return  # a place of its own, in no store of ours
    datasets = open_store(f"{root}/datasets")
    keys = set(datasets.list())
    for key in sorted(keys):
        name = key.removesuffix(f"/{FINGERPRINTS}")
        if name == key or name.startswith(f"{dataset}/") or f"{name}/{MANIFEST}" not in keys:
            continue
        table = _table(datasets.at(*name.split("/")))
        words = {
            column: np.frombuffer(b"".join(table[column].to_pylist()), "<u8").reshape(len(table), -1)
            for column in ("pixels", "bits")
        }
        prints = Fingerprints(
            table["state"].to_numpy().astype(np.uint8), words["pixels"], words["bits"], np.zeros(len(table), np.int64)
        )
        yield OtherDataset(
            name, table["key"].to_pylist(), table["split"].to_pylist(), table["labels"].to_pylist(), prints
        )
