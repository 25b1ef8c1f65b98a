"""Caches the decoded images of a split at one size, in this process or on this machine."""

from __future__ import annotations

import contextlib

import numpy as np

from data_shards.index import SplitIndex
from data_shards.loader.local_shard import LocalShards
from data_shards.loader.pixel_file import Kept, PixelFile, pixel_key
from data_shards.loader.pixels import Coded, Crop, crop_boxes

_IMAGE_S, _PIXEL_S = 60e-6, 2.5e-9  # time of decoding per image, and per value of its H x W x C pixels


class Pixels:
    """The images of a split at one size; the first ones of the index are cached after decoding, up to `capacity`.

    The cache is in memory of this process, or in a `file` shared on the machine. Every epoch visits every sample once,
    so caching a fixed part is as good as any cache of that size. Random crops differ in each epoch and are not cached.
    """

    def __init__(
        self,
        index: SplitIndex,
        shape: tuple[int, int, int],
        crop: Crop | None,
        *,
        capacity: int = 0,
        file: PixelFile | None = None,
    ):
        self.index, self.shape, self.crop, self.file = index, shape, crop, file
        if file is not None:
            self.cached, self.is_cached = file.images, file.is_filled
        else:
            self.cached = np.empty((capacity, *shape), np.uint8)  # the system allocates pages as they are filled
            self.is_cached = np.zeros(capacity, bool)
        self.memory_bytes = self.cached.nbytes if file is None else 0

    def has(self, index: np.ndarray) -> np.ndarray:
        """(n,) bool, which of these positions are cached."""
        found = (index >= 0) & (index < len(self.is_cached))
        found[found] = self.is_cached[index[found]]
        return found

    def missing(
        self, index: np.ndarray, chance: np.ndarray, *, seed: int, epoch: int, gather: bool = False
    ) -> Coded | None:
        """The images at these positions that are not cached, or all with `gather`; None if there are none."""
        wanted = index >= 0
        row = np.flatnonzero(wanted if gather else wanted & ~self.has(index))
        if not len(row):
            return None
        of, at = self.index, index[row]
        boxes = None
        if self.crop is not None:
            boxes = crop_boxes(self.crop, of.height[at], of.width[at], seed=seed, epoch=epoch, sample=chance[row])
        kept = None if self.file is None else Kept(self.file, at)
        return Coded(row, of.shard[at], of.offset[at], of.size[at], boxes, kept)

    def complete(self, images: np.ndarray, index: np.ndarray, coded: Coded | None) -> None:
        """Fills in the cached images of a batch whose other images are decoded, and caches the decoded ones."""
        if coded is None and len(index) and index.min() >= 0:
            # Positions are valid, and the default mode would copy twice.
            np.take(self.cached, index, axis=0, out=images, mode="clip")
            return
        row = np.arange(len(index))
        if coded is not None:
            row = np.delete(row, coded.row)
            if self.file is None:
                kept = coded.row[index[coded.row] < len(self.cached)]
                self.cached[index[kept]] = images[kept]
                self.is_cached[index[kept]] = True  # after the pixels, because other threads read it
        known = row[index[row] >= 0]
        images[known] = self.cached[index[known]]
        images[row[index[row] < 0]] = 0

    def decoding_s(self, index: np.ndarray) -> float:
        """Estimated seconds for one process to decode the images at these positions that are not cached."""
        missing = index[~self.has(index)]
        of = self.index
        numbers = (of.height[missing] * of.width[missing] * of.channels[missing]).sum()
        return len(missing) * _IMAGE_S + float(numbers) * _PIXEL_S


def open_pixel_file(shards: LocalShards, index: SplitIndex, shape: tuple[int, int, int]) -> PixelFile | None:
    """The machine's file of these decoded images; None if it cannot have one."""
    key = pixel_key([entry.sha256 for _, entry in shards.shards], [index.shard, index.offset, index.size], shape)
    if key is None or not len(index):
        return None
    with contextlib.suppress(OSError):  # without a writable home it is only slower
        return shards.cache.pixel_file(key, len(index), shape, to_come=shards.to_copy)
    return None
