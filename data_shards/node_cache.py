"""What the processes of one machine share: copies of remote shards within a limit, and which files were verified.

Every change is made under a file lock, which the kernel lifts when its holder is killed, and appears by a rename: a
copy is whole or not there. Files are named by their sha256, so the ranks of a machine and later runs find them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from data_shards.fields import SHA256
from data_shards.manifest import ShardEntry

# A file written to in the same tick of the file system's clock in which it was looked at would look unchanged.
_SETTLED_S = 2.0
_ROOM = "room"  # the lock of whoever takes room on the disk; all others are named by a sha256


class DigestError(ValueError):
    """Bytes that are not what they should be; `found` is their sha256."""

    def __init__(self, found: str):
        super().__init__(f"found the sha256 {found}")
        self.found = found


class NodeCache:
    """The cache of this machine.

    Args:
        limit_bytes: How much the copies may take; 0: half of what the disk has free without them.
    """

    def __init__(self, limit_bytes: int = 0):
        self.limit_bytes = limit_bytes

    def verified(self, path: Path, sha256: str) -> mmap.mmap:
        """A file of this digest as memory, read for it unless this machine did so before and it is unchanged since.

        The memory stays what it is when another file takes the file's place.

        Raises:
            DigestError: it holds other bytes.
            FileNotFoundError: there is none.
        """
        with _lock(sha256):  # so that not every process reads it at once
            return _verified(path, sha256)

    def copy(
        self, entry: ShardEntry, fetch: Callable[[], Iterator[bytes]], *, mine: Collection[str]
    ) -> mmap.mmap | None:
        """A verified copy of a shard as memory, fetched if there is none; None where there is no room for it.

        Args:
            entry: Which shard; the copy is named by its sha256.
            fetch: Its bytes, part by part.
            mine: sha256 of the shards that must not give way to this one. Of others the least recently used go.

        Raises:
            DigestError: what arrived is not the shard.
            OSError: the cache cannot be written to.
        """
        folder = cache_folder()
        path, part = folder / f"{entry.sha256}.tar", folder / f"{entry.sha256}.part"
        with _locked(folder, entry.sha256):
            with contextlib.suppress(FileNotFoundError, DigestError):  # none yet, or one damaged on this disk
                mapped = _verified(path, entry.sha256)
                os.utime(path)  # the time of its last use
                _remember(path.stat(), entry.sha256)
                return mapped
            path.unlink(missing_ok=True)
            if not self._has_room(folder, entry.bytes, part, mine):
                return None
            digest = hashlib.sha256()
            with part.open("r+b") as file:
                for data in fetch():
                    file.write(data)
                    digest.update(data)
                file.truncate()
            if digest.hexdigest() != entry.sha256:
                part.unlink()
                raise DigestError(digest.hexdigest())
            os.replace(part, path)
            _remember(path.stat(), entry.sha256)
            return _verified(path, entry.sha256)

    def _has_room(self, folder: Path, size_bytes: int, part: Path, mine: Collection[str]) -> bool:
        """Takes room for `part` on the disk; others' shards give way, those used longest ago first."""
        with _locked(folder, _ROOM):
            part.unlink(missing_ok=True)  # left by a process that was killed: its lock is ours now
            for left in _named_by_digest(folder, ".part"):
                _delete(folder, left)
            copies = {path: path.stat() for ending in (".tar", ".part") for path in _named_by_digest(folder, ending)}
            used = sum(state.st_size for state in copies.values())
            free = shutil.disk_usage(folder).free
            limit = self.limit_bytes or (free + used) // 2
            fixed = sum(state.st_size for path, state in copies.items() if path.suffix == ".part" or path.stem in mine)
            if fixed + size_bytes > limit or size_bytes >= free + used - fixed:
                return False  # nobody's copy gives way to what would not fit without it either
            for path in sorted(copies, key=lambda path: copies[path].st_mtime_ns):
                if used + size_bytes <= limit and size_bytes < free:
                    break
                if path.suffix == ".tar" and path.stem not in mine and _delete(folder, path):
                    used -= copies[path].st_size
                    free += copies[path].st_size
            if used + size_bytes > limit or size_bytes >= free:
                return False
            with part.open("wb") as file:  # taken, and counted by whoever looks next, before its bytes are there
                (os.posix_fallocate if hasattr(os, "posix_fallocate") else _truncate)(file.fileno(), 0, size_bytes)
            return True


def cache_folder() -> Path:
    """Where this machine keeps its copies, named by their sha256; made if it is missing."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "medmamba" / "shards"
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    (folder / "verified").mkdir(exist_ok=True)
    return folder


def _verified(path: Path, sha256: str) -> mmap.mmap:
    """See NodeCache.verified; under the lock of the digest."""
    with path.open("rb") as file:
        state = os.fstat(file.fileno())
        # An empty file cannot be mapped.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if state.st_size else mmap.mmap(-1, 1)
        if _is_remembered(state, sha256):
            return mapped
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise DigestError(found)
        # Had it been written to meanwhile, its state would be another, but for a write in the same tick of the clock.
        if _state(os.fstat(file.fileno())) == _state(state) and time.time() - state.st_ctime > _SETTLED_S:
            _remember(state, sha256)
        return mapped


def _is_remembered(state: os.stat_result, sha256: str) -> bool:
    with contextlib.suppress(OSError):
        return _mark(sha256, state).read_text() == _state(state)
    return False


def _remember(state: os.stat_result, sha256: str) -> None:
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time, not correctness
        mark = _mark(sha256, state)
        beside = mark.with_name(f"{mark.name}.{os.getpid()}")
        beside.write_text(_state(state))
        os.replace(beside, mark)


def _truncate(file: int, start: int, size_bytes: int) -> None:
    os.truncate(file, start + size_bytes)


@contextlib.contextmanager
def _lock(sha256: str) -> Iterator[None]:
    try:
        folder = cache_folder()
    except OSError:  # a home that cannot be written to
        yield
        return
    with _locked(folder, sha256):
        yield


@contextlib.contextmanager
def _locked(folder: Path, name: str, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of that name; BlockingIOError where another holds it and `wait` is off."""
    assert name == _ROOM or SHA256.fullmatch(name), f"{name!r} is not a sha256, but files here are named by it"
    with (folder / "locks" / name).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _named_by_digest(folder: Path, ending: str) -> list[Path]:
    return [path for path in folder.glob(f"*{ending}") if SHA256.fullmatch(path.stem)]


def _delete(folder: Path, path: Path) -> bool:
    """Removes a file of which nobody holds the lock; a process that has mapped it keeps its bytes."""
    try:
        with _locked(folder, path.stem, wait=False):
            path.unlink(missing_ok=True)
            return True
    except BlockingIOError:
        return False


def _mark(sha256: str, state: os.stat_result) -> Path:
    return cache_folder() / "verified" / f"{sha256}-{state.st_dev}-{state.st_ino}"


def _state(state: os.stat_result) -> str:
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
