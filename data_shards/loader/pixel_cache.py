"""The decoded images of a split at one size: what is kept of them, in this process or on this machine, what is not."""

from __future__ import annotations

import contextlib

import numpy as np

from data_shards.loader.local_shard import LocalShards
from data_shards.loader.pixel_file import Kept, PixelFile, pixel_key
from data_shards.loader.pixels import Coded, Crop, crop_boxes
from data_shards.manifest import SplitIndex

_IMAGE_S, _PIXEL_S = 60e-6, 2.5e-9  # what decoding takes: for each image, and for each of its H x W x C numbers


class Pixels:
    """The images of a split at one size, the first of the index kept once decoded, as many as there is room for.

    They are kept in the memory of this process, or in a `file` of the machine. Every epoch visits every sample once, so
    a fixed part of the split is hit as often as the best cache of that size. Random parts differ from epoch to epoch
    and are not kept.
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
            self.cached = np.empty((capacity, *shape), np.uint8)  # memory is taken page by page as it fills
            self.is_cached = np.zeros(capacity, bool)
        self.memory_bytes = self.cached.nbytes if file is None else 0

    def has(self, index: np.ndarray) -> np.ndarray:
        """(n,) bool, which of these positions are kept."""
        found = (index >= 0) & (index < len(self.is_cached))
        found[found] = self.is_cached[index[found]]
        return found

    def missing(
        self, index: np.ndarray, chance: np.ndarray, *, seed: int, epoch: int, gather: bool = False
    ) -> Coded | None:
        """What of these positions is not kept; with `gather` all of them."""
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
        """Adds what was kept to images that hold what was decoded, and keeps the latter in memory."""
        if coded is None and len(index) and index.min() >= 0:
            # Every mode but the default, which copies twice; the positions are valid.
            np.take(self.cached, index, axis=0, out=images, mode="clip")
            return
        row = np.arange(len(index))
        if coded is not None:
            row = np.delete(row, coded.row)
            if self.file is None:
                kept = coded.row[index[coded.row] < len(self.cached)]
                self.cached[index[kept]] = images[kept]
                self.is_cached[index[kept]] = True  # after the pixels: another thread may look
        known = row[index[row] >= 0]
        images[known] = self.cached[index[known]]
        images[row[index[row] < 0]] = 0

    def decoding_s(self, index: np.ndarray) -> float:
        """About how long one process decodes what is missing of these positions."""
        missing = index[~self.has(index)]
        of = self.index
        numbers = (of.height[missing] * of.width[missing] * of.channels[missing]).sum()
        return len(missing) * _IMAGE_S + float(numbers) * _PIXEL_S


def open_pixel_file(shards: LocalShards, index: SplitIndex, shape: tuple[int, int, int]) -> PixelFile | None:
    """The machine's file of these images; None where it cannot have one."""
    key = pixel_key([entry.sha256 for _, entry in shards.shards], [index.shard, index.offset, index.size], shape)
    if key is None or not len(index):
        return None
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time, not correctness
        return shards.cache.pixel_file(key, len(index), shape, to_come=shards.to_copy)
    return None
