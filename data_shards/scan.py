"""The look at every image before shards are planned: in chunks that any process can do, and that a killed run keeps.

Of a finished dataset the fingerprints lie beside its index, so that other datasets can be compared with it.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_shards.fingerprint import Fingerprints, fingerprint
from data_shards.leakage import OtherDataset
from data_shards.manifest import MAKE_AGAIN, MANIFEST, ManifestError
from data_shards.plan import digest_of
from data_shards.source import ImageSet, Row
from data_shards.store import Store, StoreKeyError, open_store

if TYPE_CHECKING:
    import pyarrow as pa

FINGERPRINTS = "fingerprints.parquet"
FOLDER = "scan/"
_COLUMNS = ("state", "pixels", "bits", "size")
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
    kept = _kept(key, out)
    # Where an image could not be decoded it may have been mended since.
    if kept is not None and len(kept) == len(rows) and kept.state.all():
        return kept
    began = time.monotonic()
    found = fingerprint(image_set, rows, max_side=max_side)
    if time.monotonic() - began > _WORTH_KEEPING_S:
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(found, name) for name in _COLUMNS})
        out.put(key, buffer.getvalue())
    return found


def _kept(key: str, out: Store) -> Fingerprints | None:
    try:
        with np.load(io.BytesIO(out.get(key)), allow_pickle=False) as arrays:
            return Fingerprints(*(arrays[name] for name in _COLUMNS))
    except (StoreKeyError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


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
    table = _table(out, ["key", "pixels"])
    return dict(zip(table["key"].to_pylist(), table["pixels"].to_pylist(), strict=True))


def _table(out: Store, columns: list[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(io.BytesIO(out.get(FINGERPRINTS)), columns=columns)
    except (StoreKeyError, pa.ArrowException, OSError) as error:
        raise ManifestError(
            f"{out.uri} has no whole {FINGERPRINTS} ({' '.join(str(error).split())[:120]}): delete {MANIFEST} there "
            f"{MAKE_AGAIN}"
        ) from error


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
        table = _table(datasets.at(*name.split("/")), ["key", "split", "labels", "state", "pixels", "bits"])
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
