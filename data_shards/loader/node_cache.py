"""The cache shared by the processes of one machine: copies of remote shards and decoded images within a limit, and a
record of verified files.

Every change is made under a file lock, which the kernel releases when its holder is killed, and becomes visible by a
rename, so copies are always complete. Files are named by sha256, so the ranks of a machine and later runs find them.
A file of decoded images is filled while in use (see pixel_file); its users hold a shared lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from data_shards.fields import SHA256
from data_shards.loader.pixel_file import PixelFile, file_bytes, memory_bytes, rows_in
from data_shards.manifest import ShardEntry

# A write in the same tick of the file system's clock as the check would not be noticed.
_SETTLED_S = 2.0
_ROOM = "room"  # the lock for reserving disk space; all others are named by a sha256
_ENDINGS = (".tar", ".pixels", ".part")
_LEFT_FREE_BYTES = 1 << 20


class DigestError(ValueError):
    """Bytes with an unexpected sha256, which is `found`."""

    def __init__(self, found: str):
        super().__init__(f"found the sha256 {found}")
        self.found = found


class NodeCache:
    """The cache of this machine.

    Args:
        limit_bytes: Limit for all files; 0: half of the disk space that is free without them.
    """

    def __init__(self, limit_bytes: int = 0):
        self.limit_bytes = limit_bytes

    def verified(self, path: Path, sha256: str) -> mmap.mmap:
        """A memory map of a file with this digest, which is verified unless this machine has already done so.

        The map remains valid when the file is replaced.

        Raises:
            DigestError: the file has other bytes.
            FileNotFoundError: the file does not exist.
        """
        with _lock(sha256):  # so that only one process at a time reads it
            return _verified(path, sha256)

    def copy(
        self, entry: ShardEntry, fetch: Callable[[], Iterator[bytes]], *, mine: Collection[str]
    ) -> mmap.mmap | None:
        """A memory map of a verified copy of a shard, fetched if missing; None if it does not fit.

        Args:
            entry: The shard; the copy is named by its sha256.
            fetch: Gives its bytes in parts.
            mine: sha256 of the shards that must not be evicted. Other shards, and decoded images not in use, are
                evicted, least recently used first.

        Raises:
            DigestError: the fetched bytes are not the shard.
            OSError: the cache is not writable.
        """
        folder = cache_folder()
        path, part = folder / f"{entry.sha256}.tar", folder / f"{entry.sha256}.part"
        with _locked(folder, entry.sha256):
            with contextlib.suppress(FileNotFoundError, DigestError):  # no copy yet, or a damaged one
                mapped = _verified(path, entry.sha256)
                os.utime(path)  # marks its last use
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

    def pixel_file(self, key: str, num: int, shape: tuple[int, ...], *, to_come: Mapping[str, int]) -> PixelFile | None:
        """The machine's file of decoded images with this name, created if missing; None if the disk has no room.

        A new file has as many rows as the limit, the disk and half of the memory allow: more than fits into memory
        would be read from disk repeatedly. Only decoded images not in use are evicted for it.

        Args:
            key: Its name, a sha256.
            num: Rows needed for all images.
            shape: (H, W, C) of an image.
            to_come: Shards that will also be copied here: sha256 and bytes.

        Raises:
            OSError: the cache is not writable.
        """
        folder = cache_folder()
        path, row_bytes = folder / f"{key}.pixels", math.prod(shape)
        with _locked(folder, _ROOM):
            held = _held(folder, key)
            try:
                if not path.exists():
                    wanted = min(num, memory_bytes() // 2 // row_bytes)
                    room = self._pixel_room(folder, file_bytes(wanted, row_bytes), to_come)
                    rows = min(wanted, rows_in(room, row_bytes))
                    if rows < 1:
                        os.close(held)
                        return None
                    part = path.with_suffix(".part")
                    part.touch(mode=0o600)  # images of patients, so only for this user
                    os.truncate(part, file_bytes(rows, row_bytes))  # sparse: uses disk space as it fills
                    os.replace(part, path)
                os.utime(path)
                return PixelFile(path, shape, held)
            except BaseException:
                os.close(held)
                raise

    def _pixel_room(self, folder: Path, wanted_bytes: int, to_come: Mapping[str, int]) -> int:
        """Bytes that a new file of decoded images may take, after evicting others for `wanted_bytes`."""
        _delete_left(folder)
        booted = time.time() - _since_boot_s()
        files = _files(folder)
        pixels = sorted((path for path in files if path.suffix == ".pixels"), key=lambda path: files[path].st_mtime_ns)
        there = {path.stem for path in files if path.suffix == ".tar"}
        reserved = sum(size for sha256, size in to_come.items() if sha256 not in there)
        while True:
            used = sum(state.st_size for state in files.values())
            free = _free(folder, files)
            room = min((self.limit_bytes or (free + used) // 2) - used, free - _LEFT_FREE_BYTES) - reserved
            # Files from before the last boot are useless.
            if not pixels or (room >= wanted_bytes and files[pixels[0]].st_mtime >= booted):
                return max(0, room)
            if _delete(folder, oldest := pixels.pop(0)):
                del files[oldest]

    def _has_room(self, folder: Path, size_bytes: int, part: Path, mine: Collection[str]) -> bool:
        """Reserves disk space for `part`, evicting other files, least recently used first; False if there is none."""
        with _locked(folder, _ROOM):
            part.unlink(missing_ok=True)  # left by a killed process, because we hold the lock
            _delete_left(folder)
            copies = _files(folder)
            used = sum(state.st_size for state in copies.values())
            free = _free(folder, copies)
            limit = self.limit_bytes or (free + used) // 2
            fixed = sum(state.st_size for path, state in copies.items() if path.suffix == ".part" or path.stem in mine)
            if fixed + size_bytes > limit or size_bytes >= free + used - fixed:
                return False  # would not fit even after evicting everything else
            for path in sorted(copies, key=lambda path: copies[path].st_mtime_ns):
                if used + size_bytes <= limit and size_bytes < free:
                    break
                if path.suffix != ".part" and path.stem not in mine and _delete(folder, path):
                    used -= copies[path].st_size
                    free += copies[path].st_size
            if used + size_bytes > limit or size_bytes >= free:
                return False
            _allocate(part, size_bytes)
            return True


def cache_folder() -> Path:
    """The folder of this machine's cache; created if missing."""
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
        # A concurrent write changes the state, unless it happens in the same tick of the clock.
        if _state(os.fstat(file.fileno())) == _state(state) and time.time() - state.st_ctime > _SETTLED_S:
            _remember(state, sha256)
        return mapped


def _is_remembered(state: os.stat_result, sha256: str) -> bool:
    with contextlib.suppress(OSError):
        return _mark(sha256, state).read_text() == _state(state)
    return False


def _remember(state: os.stat_result, sha256: str) -> None:
    with contextlib.suppress(OSError):  # without a writable home it is only slower
        mark = _mark(sha256, state)
        temporary = mark.with_name(f"{mark.name}.{os.getpid()}")
        temporary.write_text(_state(state))
        os.replace(temporary, mark)


def _allocate(path: Path, size_bytes: int) -> None:
    """Creates a file of full size, so that other processes count its space before it is written."""
    with path.open("wb") as file:
        (os.posix_fallocate if hasattr(os, "posix_fallocate") else _truncate)(file.fileno(), 0, size_bytes)


def _truncate(file: int, start: int, size_bytes: int) -> None:
    os.truncate(file, start + size_bytes)


def _since_boot_s() -> float:
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@contextlib.contextmanager
def _lock(sha256: str) -> Iterator[None]:
    try:
        folder = cache_folder()
    except OSError:  # no writable home
        yield
        return
    with _locked(folder, sha256):
        yield


@contextlib.contextmanager
def _locked(folder: Path, name: str, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of that name; BlockingIOError if another process holds it and `wait` is False."""
    assert name == _ROOM or SHA256.fullmatch(name), f"{name!r} is not a sha256, but files here are named by it"
    with (folder / "locks" / name).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _held(folder: Path, name: str) -> int:
    """A descriptor with the shared lock of that name; closing it releases the lock."""
    file = os.open(folder / "locks" / name, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _named_by_digest(folder: Path, ending: str) -> list[Path]:
    return [path for path in folder.glob(f"*{ending}") if SHA256.fullmatch(path.stem)]


def _files(folder: Path) -> dict[Path, os.stat_result]:
    """All files that use disk space."""
    return {path: path.stat() for ending in _ENDINGS for path in _named_by_digest(folder, ending)}


def _free(folder: Path, files: Mapping[Path, os.stat_result]) -> int:
    """Free disk space, minus the space that sparse files will still use."""
    filling = [state for path, state in files.items() if path.suffix == ".pixels"]
    return shutil.disk_usage(folder).free - sum(max(0, state.st_size - 512 * state.st_blocks) for state in filling)


def _delete_left(folder: Path) -> None:
    """Removes unfinished files of killed processes."""
    for left in _named_by_digest(folder, ".part"):
        _delete(folder, left)


def _delete(folder: Path, path: Path) -> bool:
    """Removes a file unless it is locked; processes that have mapped it keep its bytes."""
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
