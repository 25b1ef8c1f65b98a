"""The look at every image before shards are planned: in chunks that any process can do.

A conversion that was refused or killed leaves its fingerprints in the store, so that the next try need not look again.
Those of a finished dataset are stored next to its index, so that other datasets can be compared with it.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_shards.config import DataConfig
from data_shards.duplicates.clusters import OtherDataset
from data_shards.duplicates.fingerprint import BLANK, SHARP, UNDECODABLE, Fingerprints, fingerprint
from data_shards.fields import KEY, MAX_CLASSES
from data_shards.manifest import MAKE_AGAIN, MANIFEST, ManifestError, read_classes
from data_shards.plan import digest_of
from data_shards.renamed import stored_values
from data_shards.rules import RULES
from data_shards.source.row import ImageSet, Reader, Row
from data_shards.split import SPLITS
from data_shards.store import Store, StoreError, StoreKeyError, open_store
from data_shards.store.bounded_table import TableError, read_bounded

if TYPE_CHECKING:
    import pyarrow as pa

FINGERPRINTS = "fingerprints.parquet"
FOLDER = "scan/"
REFUSED = f"{FOLDER}leakage.json"
"""The report of duplicates of a conversion that was refused because of them."""
_ENDING = ".npz"
_SHAPES: dict[str, tuple[tuple[int, ...], np.dtype]] = {
    "state": ((), np.dtype(np.uint8)),
    "pixels": ((2,), np.dtype(np.uint64)),
    "bits": ((3,), np.dtype(np.uint64)),
    "size": ((), np.dtype(np.int64)),
    "thumbnails": ((32, 32), np.dtype(np.uint8)),
}
_WORTH_KEEPING_S = 2.0  # doing a faster chunk again after a kill costs less than writing it in every conversion
_ID_BYTES = 16
# Of one task, and about so many tasks.
_FEWEST_IMAGES, _MOST_IMAGES, _TASKS = 32, 4096, 64


class Scan:
    """The fingerprints of N rows: those that an earlier attempt left in the store, and those that `add` adds.

    A fingerprint is known by what decides it (the image's file and its stamp, the frame, max_side, the DICOM settings,
    the rules) and by the salt, without which a file's name could be guessed from it. Labels, splits, seeds, what is
    done about duplicates and the conversion's name do not matter, so an attempt with other ones finds it again. Images
    that could not be decoded are never kept: what was missing, such as a library, may be there now.
    """

    def __init__(self, image_set: ImageSet, config: DataConfig, out: Store):
        settings = digest_of([RULES, config.salt, config.max_side, stored_values(config.dicom)])
        self.ids = [image_id(settings, image_set.reader.stamp(row), row.frame) for row in image_set.rows]
        self._image_set, self._max_side, self._out = image_set, config.max_side, out
        num = len(self.ids)
        self._thumbnails = config.duplicates.symmetries == "all"
        self._columns = tuple(_SHAPES) if self._thumbnails else tuple(_SHAPES)[:-1]
        self.prints = Fingerprints(
            *(np.zeros((num, *shape), kind) for shape, kind in (_SHAPES[name] for name in self._columns))
        )
        self._found = np.zeros(num, bool)
        for known in _kept_in_store(out, config.dataset, self._columns):
            self._take(known)
        self._new = False

    @property
    def missing(self) -> np.ndarray:
        """Positions of the rows that still have to be read, in order."""
        return np.flatnonzero(~self._found)

    def tasks(self) -> list[ScanTask]:
        """The rows that still have to be read: enough tasks for many workers, of at most 4,096 images."""
        missing = self.missing
        step = min(_MOST_IMAGES, max(_FEWEST_IMAGES, -(-len(missing) // _TASKS)))
        return [self._task(missing[start : start + step]) for start in range(0, len(missing), step)]

    def _task(self, positions: np.ndarray) -> ScanTask:
        among = positions.tolist()
        rows, ids = [self._image_set.rows[i] for i in among], [self.ids[i] for i in among]
        return ScanTask(self._image_set.reader, rows, positions, ids, self._max_side, self._out, self._thumbnails)

    def add(self, positions: np.ndarray, prints: Fingerprints) -> None:
        """Fingerprints of the rows at these positions."""
        for name in self._columns:
            getattr(self.prints, name)[positions] = getattr(prints, name)
        self._found[positions] = self._new = True

    def keep(self, out: Store) -> None:
        """Writes all known fingerprints to the store as one object, for the next attempt."""
        if not self._new or out.head(MANIFEST) is not None:
            return
        before = list(out.list(FOLDER))
        known = np.flatnonzero(self._found)
        columns = Fingerprints(*(getattr(self.prints, name)[known] for name in self._columns))
        kept = _keep([self.ids[i] for i in known.tolist()], columns, out)
        for key in before:
            if key.endswith(_ENDING) and key != kept:
                out.delete(key)

    def _take(self, known: tuple[dict[str, int], Fingerprints]) -> None:
        places, prints = known
        found = [(i, places[name]) for i, name in enumerate(self.ids) if name in places and not self._found[i]]
        if found:
            here, there = (np.array(column) for column in zip(*found, strict=True))
            self.add(here, Fingerprints(*(getattr(prints, name)[there] for name in self._columns)))


@contextlib.contextmanager
def kept_if_ended(scan: Scan, out: Store) -> Iterator[None]:
    """Keeps the fingerprints where the block ends early, by a refusal or Ctrl-C."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StoreError):  # what ended the block is reported
            scan.keep(out)
        raise


def image_id(settings: str, stamp: str, frame: int) -> str:
    """What identifies an image's fingerprint: 32 hex digits, or "" where its file has no stamp."""
    return digest_of([settings, stamp, frame])[:32] if stamp else ""


@dataclass(frozen=True)
class ScanTask:
    """Rows whose images are to be fingerprinted; it can be pickled and holds no other rows."""

    reader: Reader
    rows: Sequence[Row]
    positions: np.ndarray
    """Where these rows are among those of the image set."""
    ids: Sequence[str]
    max_side: int | None
    out: Store
    thumbnails: bool = False


def scan_rows(task: ScanTask) -> tuple[np.ndarray, Fingerprints]:
    """Positions and fingerprints of the task's rows. Runs in any process.

    Where they took long they are kept in the store at once, because the driver may be killed.
    """
    began = time.monotonic()
    found = fingerprint(task.reader, task.rows, max_side=task.max_side, thumbnails=task.thumbnails)
    if time.monotonic() - began > _WORTH_KEEPING_S:
        _keep(task.ids, found, task.out)
    return task.positions, found


def _keep(ids: Sequence[str], prints: Fingerprints, out: Store) -> str:
    """Writes fingerprints of images that have an id and could be decoded; the object's key."""
    chosen = np.array([bool(name) for name in ids], bool) & (prints.state != UNDECODABLE)
    names = [name for name, keep in zip(ids, chosen, strict=True) if keep]
    key = f"{FOLDER}{digest_of(names)[:20]}{_ENDING}"
    buffer = io.BytesIO()
    columns = {name: values[chosen] for name in _SHAPES if (values := getattr(prints, name)) is not None}
    np.savez(buffer, ids=np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, _ID_BYTES), **columns)
    out.put(key, buffer.getvalue())
    return key


def _kept_in_store(out: Store, dataset: str, columns: Sequence[str]) -> Iterator[tuple[dict[str, int], Fingerprints]]:
    """What attempts of this conversion, and of the same dataset under another name, left: id -> place, and prints."""
    root, _, rest = out.uri.rpartition(f"/datasets/{dataset}/")
    if root and "/" not in rest:
        out = open_store(f"{root}/datasets/{dataset}", patience_s=out.patience_s)
        keys = [key for key in out.list() if key.count("/") == 2 and key.partition("/")[2].startswith(FOLDER)]
    else:
        keys = list(out.list(FOLDER))
    for key in keys:
        found = _kept(key, out, columns) if key.endswith(_ENDING) else None
        if found is not None:
            yield found


def _kept(key: str, out: Store, columns: Sequence[str]) -> tuple[dict[str, int], Fingerprints] | None:
    """Fingerprints that were kept; None where they are damaged, of another release, or lack one of the columns."""
    try:
        data = out.get(key)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            num = _num_rows(archive)
            if num * _ID_BYTES > len(data):  # they are not compressed
                return None
            ids = _column(archive, "ids", num, np.dtype(np.uint8), (_ID_BYTES,))
            prints = Fingerprints(
                *(_column(archive, name, num, _SHAPES[name][1], _SHAPES[name][0]) for name in columns)
            )
    except (StoreKeyError, ValueError, KeyError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    if not np.isin(prints.state, (BLANK, SHARP)).all() or (prints.size < 0).any():
        return None
    return {name.tobytes().hex(): i for i, name in enumerate(ids)}, prints


def _num_rows(archive: zipfile.ZipFile) -> int:
    with archive.open("ids.npy") as file:
        np.lib.format.read_magic(file)
        return int(np.lib.format.read_array_header_1_0(file)[0][0])


def _column(archive: zipfile.ZipFile, name: str, num: int, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """One array of `num` rows. np.load would take memory for whatever shape a header claims."""
    with archive.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is not an array of format 1.0")
        found = np.lib.format.read_array_header_1_0(file)
        if found != ((num, *shape), False, kind):
            raise ValueError(f"{name} is {found}, not {(num, *shape)} {kind}")
        data = file.read(num * math.prod(shape) * kind.itemsize)
    return np.frombuffer(data, kind).reshape(num, *shape).copy()


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


def stored_samples(out: Store, keys: Collection[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Split and labels of those of a finished dataset's keys, undecodable images' too; none where they are damaged."""
    try:
        table = _table(out)
    except ManifestError:
        return {}
    rows = zip(*(table[name].to_pylist() for name in ("key", "split", "labels")), strict=True)
    return {key: (split, tuple(labels)) for key, split, labels in rows if key in keys}


def _table(out: Store) -> pa.Table:
    """The fingerprints of a finished dataset, each value of the kind and range that `fingerprints_bytes` writes."""
    try:
        table = read_bounded(out.get(FINGERPRINTS), _schema(), least_row_bytes=16, most_labels=MAX_CLASSES)
        problem = _problem(table)
    except (StoreKeyError, TableError) as error:
        problem = " ".join(str(error).split())[:120]
    if problem:
        raise ManifestError(
            f"{out.uri} has no complete {FINGERPRINTS} ({problem}): delete {MANIFEST} there {MAKE_AGAIN}"
        )
    return table


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = {"key": pa.string(), "split": pa.string(), "labels": pa.list_(pa.int32()), "state": pa.uint8()}
    return pa.schema({**kinds, "pixels": pa.binary(16), "bits": pa.binary(24)})


def _problem(table: pa.Table) -> str:
    """The first column with a value that fingerprints cannot have, and the rule; "" for none."""
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

    Other conversions of the same images are not included. ManifestError where the fingerprints of one are damaged.
    """
    root, _, rest = out.uri.rpartition(f"/datasets/{dataset}/")
    if not root or "/" in rest:
        return  # not in a store
    datasets = open_store(f"{root}/datasets", patience_s=out.patience_s)
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
            name,
            table["key"].to_pylist(),
            table["split"].to_pylist(),
            table["labels"].to_pylist(),
            prints,
            read_classes(datasets.at(*name.split("/"))),
        )
