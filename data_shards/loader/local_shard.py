"""A dataset's shards as verified memory maps on this machine: the store's files, or copies of its objects.

Shards that do not fit into the machine's cache are read from the store image by image.
"""

from __future__ import annotations

import contextlib
import mmap
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_shards.loader.node_cache import DigestError, NodeCache
from data_shards.manifest import MAKE_AGAIN, MANIFEST, ShardEntry
from data_shards.shard import tar_key
from data_shards.store import Store, StoreKeyError

_PART_BYTES = 16 << 20
_HEADER = tarfile.BLOCKSIZE
# One request that also reads the gap between two images is faster than two: S3 answers after some 20 ms, at 50 MB/s and
# more.
_GAP_BYTES, _RANGE_BYTES = 256 << 10, 8 << 20
_REQUESTS = 8  # concurrent, per process


class ShardError(ValueError):
    """A shard is missing, or its bytes differ from the manifest."""


class LocalShards:
    """Shards by position; each is verified against its sha256 when first opened on this machine."""

    def __init__(self, shards: Sequence[tuple[Store, ShardEntry]], disk_bytes: int = 0):
        self.shards, self.disk_bytes = tuple(shards), disk_bytes
        self.cache = NodeCache(disk_bytes)
        self._open: dict[int, mmap.mmap | None] = {}  # None: no room for a copy, so it is read by ranges
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[LocalShards], tuple[tuple[tuple[Store, ShardEntry], ...], int]]:
        return LocalShards, (self.shards, self.disk_bytes)

    @property
    def to_copy(self) -> dict[str, int]:
        """Shards of which this machine needs a copy: sha256 and bytes."""
        return {entry.sha256: entry.bytes for store, entry in self.shards if store.path(tar_key(entry.name)) is None}

    def read_many(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        """For each n the bytes [offset[n], offset[n] + size[n]) of the shard at position shard[n].

        Raises:
            ShardError: a shard is missing or damaged.
        """
        places = list(zip(shard.tolist(), offset.tolist(), size.tolist(), strict=True))
        found: dict[int, bytes] = {}
        far = []
        for n, (at, first, length) in enumerate(places):
            mapped = self._mapped(at)
            if mapped is None:
                far.append(n)
            else:
                found[n] = mapped[first : first + length]
        if far:
            found |= self._read_far({n: places[n] for n in far})
        return [found[n] for n in range(len(places))]

    def _mapped(self, shard: int) -> mmap.mmap | None:
        if shard not in self._open:
            with self._lock:  # so that only one thread fetches and hashes a shard
                if shard not in self._open:
                    self._open[shard] = self._opened(*self.shards[shard])
        return self._open[shard]

    def _opened(self, store: Store, entry: ShardEntry) -> mmap.mmap | None:
        path = store.path(tar_key(entry.name))
        try:
            # Checked before bytes are read or space is reserved, because the object may be missing or of any size.
            if (size_bytes := _size_there(store, entry)) != entry.bytes:
                found = "is missing" if size_bytes is None else f"has {size_bytes} bytes instead of {entry.bytes}"
                raise _damaged(store, entry, found)
            if path is not None:
                return self.cache.verified(path, entry.sha256)
            mine = {shard.sha256 for _, shard in self.shards}
            with contextlib.suppress(DigestError):  # it may have been damaged in transfer, so try twice
                return self.cache.copy(entry, lambda: _parts(store, entry), mine=mine)
            return self.cache.copy(entry, lambda: _parts(store, entry), mine=mine)
        except (StoreKeyError, FileNotFoundError):
            raise _damaged(store, entry, "is missing") from None
        except DigestError as error:
            raise _damaged(store, entry, f"has the sha256 {error.found}") from None
        except OSError as error:
            where = path or "the shard cache of this machine (below XDG_CACHE_HOME, or else ~/.cache)"
            raise ShardError(
                f"{where} cannot be used: {error}; make it readable and writable, and free some space"
            ) from error

    def _read_far(self, places: dict[int, tuple[int, int, int]]) -> dict[int, bytes]:
        """Reads these places from the store, with one request for neighbors."""
        runs: list[list[int]] = []
        for n in sorted(places, key=lambda n: places[n]):
            shard, first, size = places[n]
            if runs:
                last_shard, begin = places[runs[-1][0]][:2]
                end = sum(places[runs[-1][-1]][1:])
                if shard == last_shard and first - end <= _GAP_BYTES and first + size - begin <= _RANGE_BYTES:
                    runs[-1].append(n)
                    continue
            runs.append([n])
        found: dict[int, bytes] = {}
        with ThreadPoolExecutor(min(_REQUESTS, len(runs)), thread_name_prefix="ranges") as pool:
            for part in pool.map(lambda run: self._read_run({n: places[n] for n in run}), runs):
                found |= part
        return found

    def _read_run(self, places: dict[int, tuple[int, int, int]]) -> dict[int, bytes]:
        """Reads neighboring places of one shard. They have no digest, so their tar headers are checked instead."""
        store, entry = self.shards[next(iter(places.values()))[0]]
        begin = min(first for _, first, _ in places.values()) - _HEADER
        end = max(first + size for _, first, size in places.values())
        try:
            data = store.get(tar_key(entry.name), start=begin, length=end - begin)
        except StoreKeyError:
            raise _damaged(store, entry, "is missing") from None
        for _, first, size in places.values():
            try:
                header = tarfile.TarInfo.frombuf(data[first - _HEADER - begin : first - begin], "ascii", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError):
                header = tarfile.TarInfo()
            if header.size != size or len(data) != end - begin:
                raise _damaged(store, entry, f"has no member of {size} bytes at {first}")
        return {n: data[first - begin : first - begin + size] for n, (_, first, size) in places.items()}


def _parts(store: Store, entry: ShardEntry) -> Iterator[bytes]:
    for first in range(0, entry.bytes, _PART_BYTES):
        yield store.get(tar_key(entry.name), start=first, length=_PART_BYTES)


def _size_there(store: Store, entry: ShardEntry) -> int | None:
    """The shard's size in the store; an unexpected answer may be an error, so it is requested up to three times."""
    for _ in range(3):
        if (size_bytes := store.head(tar_key(entry.name))) == entry.bytes:
            break
    return size_bytes


def _damaged(store: Store, entry: ShardEntry, found: str) -> ShardError:
    key = tar_key(entry.name)
    return ShardError(
        f"shard {key} of {store.uri} {found}, but the manifest says sha256 {entry.sha256}: it was lost, damaged or "
        f"replaced; delete {key} and {MANIFEST} there {MAKE_AGAIN}"
    )
