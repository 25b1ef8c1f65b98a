"""A dataset's shards as verified memory maps on this machine: the store's own files, or copies of its objects."""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import threading
from pathlib import Path

import numpy as np

from data_shards.manifest import MANIFEST, Manifest, ShardEntry
from data_shards.shard import tar_key
from data_shards.store import Store, StoreKeyError

_PART_BYTES = 16 << 20


class ShardError(ValueError):
    """A shard that is missing or does not hold the bytes its manifest promises."""


class LocalShards:
    """The shards of one dataset; each is verified against its sha256 when this process first opens it."""

    def __init__(self, store: Store, manifest: Manifest):
        self.store, self.manifest = store, manifest
        self._open: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of the shard at that position in the manifest.

        Raises:
            ShardError: the shard is missing or damaged.
        """
        opened = self._open.get(shard)
        if opened is None:
            with self._lock:  # so that no two threads fetch and hash the same shard
                opened = self._open.get(shard) or self._opened(shard)
        return opened[offset : offset + size]

    def read_many(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        """`read` for each of the places, in their order."""
        return [self.read(*place) for place in zip(shard.tolist(), offset.tolist(), size.tolist(), strict=True)]

    def __reduce__(self):
        return LocalShards, (self.store, self.manifest)

    def _opened(self, shard: int) -> mmap.mmap:
        entry = self.manifest.shards[shard]
        path = self.store.path(tar_key(entry.name)) or cache_folder() / f"{entry.sha256}.tar"
        mapped, found = _mapped(path)
        if found != entry.sha256 and not self.store.is_local:  # no copy yet, or one damaged on this machine's disk
            self._fetch(entry, path)
            mapped, found = _mapped(path)
        if mapped is None or found != entry.sha256:
            raise ShardError(
                f"shard {tar_key(entry.name)} of {self.store.uri} has the sha256 {found}, but the manifest says "
                f"{entry.sha256}: it was lost, damaged or replaced; delete {tar_key(entry.name)} and {MANIFEST} there "
                "and run the shard step again (the other shards are kept)"
            )
        self._open[shard] = mapped
        return mapped

    def _fetch(self, entry: ShardEntry, copy: Path) -> None:
        # Copied beside and renamed, so that another rank on this machine never maps a part of a shard.
        with tempfile.NamedTemporaryFile(dir=copy.parent, prefix=".tmp-", delete=False) as beside:
            try:
                for start in range(0, entry.bytes, _PART_BYTES):
                    beside.write(self.store.get(tar_key(entry.name), start=start, length=_PART_BYTES))
                beside.close()
                os.replace(beside.name, copy)
            except StoreKeyError:
                Path(beside.name).unlink()
            except BaseException:
                Path(beside.name).unlink(missing_ok=True)
                raise


def cache_folder() -> Path:
    """Where this machine keeps shards fetched from S3, named by their sha256; made if it is missing."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "medmamba" / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _mapped(path: Path) -> tuple[mmap.mmap | None, str]:
    """The file as memory, and its sha256."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None, "nothing (there is no such file)"
    except ValueError:  # an empty file cannot be mapped
        return None, "nothing (it is empty)"
    return mapped, hashlib.sha256(mapped).hexdigest()
