"""Decoded images in a file of this machine's cache, shared by all processes that read the same images.

The file has `capacity` rows of pixels, followed by one byte per row, which is 1 once the row is complete. A process
writes the pixels of an image before its byte, so a killed process leaves no incomplete row marked as complete; two that
write the same row write the same bytes. This order holds within one running kernel, not on disk after a crash, so the
file's name depends on the boot id. The file is accessed with pread and pwrite: a full disk is then an error instead of
a signal, and no page is mapped twice.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import features

_FORMAT = 1
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class PixelFile:
    """An open file of decoded images.

    Args:
        path: The file.
        shape: (H, W, C) of an image.
        held: A descriptor to close with this file: the lock that protects it from eviction.

    Raises:
        OSError: the file cannot be opened for reading and writing.
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
        # Both change while other processes fill the file.
        self.images = np.frombuffer(self._map, np.uint8, flags_at).reshape(self.capacity, *shape)
        self.is_filled = np.frombuffer(self._map, np.bool_, self.capacity, flags_at)

    def __reduce__(self) -> tuple[Callable[[str, tuple[int, ...]], PixelFile | None], tuple[str, tuple[int, ...]]]:
        return reopened, (str(self.path), self.shape)

    def read(self, position: int, image: np.ndarray) -> bool:
        """Fills the contiguous image (H, W, C) from a row; False if the row is not filled."""
        if position >= self.capacity or not self.is_filled[position]:
            return False
        return os.preadv(self._file, [image.data], position * self.row_bytes) == self.row_bytes

    def write(self, position: int, image: np.ndarray) -> None:
        """Stores an image; does nothing if the file has no such row or the disk is full."""
        if position >= self.capacity:
            return
        with contextlib.suppress(OSError):  # the image will be decoded again
            if os.pwrite(self._file, image.data, position * self.row_bytes) == self.row_bytes:
                os.pwrite(self._file, b"\1", self.capacity * self.row_bytes + position)


@dataclass(frozen=True)
class Kept:
    """The cache rows of a batch's images, filled or to be filled after decoding."""

    file: PixelFile | None  # None if the file could not be opened in this process
    position: np.ndarray  # (n,) int64, row of the file

    def read_into(self, images: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Fills the rows of `images` that are cached; returns (n,) bool, which ones."""
        if self.file is None:
            return np.zeros(len(row), bool)
        pairs = zip(self.position.tolist(), row.tolist(), strict=True)
        return np.array([self.file.read(position, images[at]) for position, at in pairs], bool)

    def write(self, n: int, image: np.ndarray) -> None:
        """Stores the n-th image."""
        if self.file is not None:
            self.file.write(int(self.position[n]), image)


@functools.lru_cache(maxsize=16)
def reopened(path: str, shape: tuple[int, ...]) -> PixelFile | None:
    """The file, opened once in this process; None if it is gone."""
    try:
        return PixelFile(Path(path), shape)
    except (OSError, ValueError):
        return None


def file_bytes(capacity: int, row_bytes: int) -> int:
    """Size of a file with `capacity` rows."""
    return capacity * (row_bytes + 1)


def rows_in(size_bytes: int, row_bytes: int) -> int:
    """Number of rows in a file of this size."""
    return size_bytes // (row_bytes + 1)


def pixel_key(sha256s: Sequence[str], places: Sequence[np.ndarray], shape: tuple[int, ...]) -> str | None:
    """The name of the file of these images at this size; None if the system has no boot id.

    Args:
        sha256s: Digests of the shards.
        places: Columns of int64 with the shard, offset and size of each image.
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
    """Memory of this machine in bytes, or the limit of this process's cgroup."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _GROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            total = min(total, int(path.read_text()))
    return total


def _decoders() -> tuple[str, ...]:
    """Versions of the decoders: other versions may round differently."""
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
