"""Decoded whole images in a file of this machine's cache, shared by all processes that read the same images.

The file holds `capacity` rows of pixels and behind them one byte for each row, which is 1 once the row is complete.
Whoever decodes an image writes its pixels first and its byte second, so a process that is killed leaves no row that
would be believed; two that write the same row write the same bytes. That order holds in the memory of one running
kernel, not on the disk after a crash: the name of a file therefore contains the boot of its machine.
Read and written with pread and pwrite: a full disk is then an error and not a signal, and no page is mapped twice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

_FORMAT = 1
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class PixelFile:
    """An open file of decoded images.

    Args:
        path: The file.
        shape: (H, W, C) of an image.
        held: An open file that is closed with this one: the lock that keeps the cache from deleting it.

    Raises:
        OSError: it cannot be read and written.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], held: int | None = None):
        self.path, self.shape = path, tuple(shape)
        self.row_bytes = math.prod(shape)
        self._file = os.open(path, os.O_RDWR)
        opened = [self._file] if held is None else [self._file, held]
        self._close = weakref.finalize(self, _close, opened)
        self.capacity = rows_in(os.fstat(self._file).st_size, self.row_bytes)
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        flags_at = self.capacity * self.row_bytes
        # Both change as others fill the file.
        self.images = np.frombuffer(self._map, np.uint8, flags_at).reshape(self.capacity, *shape)
        self.is_filled = np.frombuffer(self._map, np.bool_, self.capacity, flags_at)

    def __reduce__(self):
        return reopened, (str(self.path), self.shape)

    def read(self, position: int, image: np.ndarray) -> bool:
        """Fills the image (H, W, C), contiguous, from a row; False where the row is not there."""
        if position >= self.capacity or not self.is_filled[position]:
            return False
        return os.preadv(self._file, [image.data], position * self.row_bytes) == self.row_bytes

    def write(self, position: int, image: np.ndarray) -> None:
        """Keeps an image; nothing happens where the file has no such row or the disk no room."""
        if position >= self.capacity:
            return
        with contextlib.suppress(OSError):  # what is not kept is decoded again
            if os.pwrite(self._file, image.data, position * self.row_bytes) == self.row_bytes:
                os.pwrite(self._file, b"\1", self.capacity * self.row_bytes + position)


@dataclass(frozen=True)
class Kept:
    """Where images of a batch are kept, or are to be once they are decoded."""

    file: PixelFile | None  # None: the file could not be opened in this process
    position: np.ndarray  # (n,) int64, row of the file

    def read_into(self, images: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Fills the rows of `images` that are kept; returns (n,) bool, which they are."""
        if self.file is None:
            return np.zeros(len(row), bool)
        pairs = zip(self.position.tolist(), row.tolist(), strict=True)
        return np.array([self.file.read(position, images[at]) for position, at in pairs], bool)

    def write(self, n: int, image: np.ndarray) -> None:
        """Keeps the n-th image."""
        if self.file is not None:
            self.file.write(int(self.position[n]), image)


@functools.lru_cache(maxsize=16)
def reopened(path: str, shape: tuple[int, ...]) -> PixelFile | None:
    """The file, opened once in this process; None where it is gone."""
    try:
        return PixelFile(Path(path), shape)
    except (OSError, ValueError):
        return None


def file_bytes(capacity: int, row_bytes: int) -> int:
    """Size of a file of so many rows."""
    return capacity * (row_bytes + 1)


def rows_in(size_bytes: int, row_bytes: int) -> int:
    """How many rows a file of this size has."""
    return size_bytes // (row_bytes + 1)


def pixel_key(sha256s: Sequence[str], places: Sequence[np.ndarray], shape: tuple[int, ...]) -> str | None:
    """The name of the file of these images at this size; None where this system does not tell when it was started.

    Args:
        sha256s: Of the shards.
        places: Columns of int64 that say which bytes of which shard each image is.
        shape: (H, W, C).
    """
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        return None
    digest = hashlib.sha256(repr((_FORMAT, boot, _decoders(), tuple(shape), list(sha256s))).encode())
    for column in places:
        digest.update(np.ascontiguousarray(column, np.int64).data)
    return digest.hexdigest()


def memory_bytes() -> int:
    """Memory of this machine, or of the part of it that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _GROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            total = min(total, int(path.read_text()))
    return total


def _decoders() -> tuple[str, ...]:
    """What decides the pixels of a coded image: other versions may round otherwise."""
    from PIL import features

    return (
        PIL.__version__,
        _version("pyspng"),
        _version("simplejpeg"),
        *(str(features.version(name)) for name in ("jpg", "libjpeg_turbo", "zlib")),
    )


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
