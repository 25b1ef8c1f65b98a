"""Reads a dataset: owns its shards, decoded images and decoding processes."""

from __future__ import annotations

import functools
import math
from types import TracebackType
from typing import Self

import numpy as np

from data_shards.loader.batch_plan import BatchPlan
from data_shards.loader.epoch import Epoch, Pools, Workers
from data_shards.loader.local_shard import LocalShards
from data_shards.loader.micro_batch import GpuMemory, plain_memory
from data_shards.loader.mixture import Mixture
from data_shards.loader.pixel_cache import Pixels, open_pixel_file
from data_shards.loader.pixels import Crop, decode_into
from data_shards.manifest import Dataset

CACHE_BYTES = 512 << 20


class Loader:
    """Reads a dataset for one rank: `epoch` gives its micro-batches.

    Opened shards, decoded images and decoding processes are reused by later epochs and other splits. A context manager:
    leaving the block ends the processes and frees the memory.

    Args:
        dataset: From `open_dataset`, or several of them from `mix`.
        rank: This rank, from 0.
        ranks: Number of ranks.
        workers: Number of threads or processes that prepare micro-batches ahead; 0 prepares each on demand.
        processes: Whether the workers are processes; None: with a GPU if anything is left to decode, else if there is
            enough to decode to justify their start.
        memory: Memory for this process's GPU: micro-batches are created in it, and decoded images without a crop are
            cached in a file shared by the processes of this machine, instead of in `cache_bytes`.
        cache_bytes: Memory for decoded images without a crop, kept across epochs; 0 disables it.
        disk_bytes: Limit for copies of remote shards and decoded images of all datasets on this machine's disk; 0: half
            of the free space. Shards that do not fit are read image by image.

    Raises:
        ValueError: `rank` is not one of the ranks.
    """

    def __init__(
        self,
        dataset: Dataset | Mixture,
        *,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 1,
        processes: bool | None = None,
        memory: GpuMemory | None = None,
        cache_bytes: int = CACHE_BYTES,
        disk_bytes: int = 0,
    ):
        if ranks < 1:
            raise ValueError(f"ranks is {ranks}, but must be at least 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}, but with {ranks} ranks it must be from 0 to {ranks - 1}")
        self.dataset, self.rank, self.ranks = dataset, rank, ranks
        self._workers = Workers(workers, processes, memory)
        self._cache_bytes = cache_bytes
        if isinstance(dataset, Mixture):
            shards = dataset.shards
        else:
            shards = [(dataset.store, shard) for shard in dataset.manifest.shards]
        self._shards = LocalShards(shards, disk_bytes)
        self._pixels: dict[tuple[str, tuple[int, int], Crop | None], Pixels] = {}
        self.pools = Pools(self._shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the decoding processes and releases the decoded images."""
        self.pools.close()
        self._pixels.clear()

    def epoch(self, plan: BatchPlan, epoch: int = 0, *, start: int = 0, next_epoch: bool = False) -> Epoch:
        """The micro-batches of this rank for one epoch.

        Args:
            plan: How the split is cut into micro-batches.
            epoch: Number of the epoch, from 0; with the plan's seed it decides the order and the random crops.
            start: Samples of the epoch already consumed: `consumed` of the last micro-batch seen.
            next_epoch: In training, whether the next epoch will follow: decoding processes start with it while the
                last micro-batches of this one, and a validation, are still in use.

        Raises:
            ValueError: see `BatchPlan.of_epoch`.
            ShardError: a shard is missing or damaged (raised while iterating).
            DecodeProcessError: a decoding process was killed (raised while iterating).
        """
        of_epoch = plan.of_epoch(self.dataset, epoch, start=start, rank=self.rank, ranks=self.ranks)
        return Epoch(
            of_epoch,
            self._pixels_of(plan.split, plan.size, plan.crop),
            self.dataset.index(plan.split).labels,
            self.pools,
            self._workers,
            functools.partial(self.epoch, plan, epoch + 1) if plan.train and next_epoch else None,
        )

    def read(self, split: str, index: np.ndarray, *, image_size: int) -> np.ndarray:
        """The images at these positions of the split's index, uint8 (len(index), H, W, C), resized to `image_size`."""
        pixels = self._pixels_of(split, (image_size, image_size), None)
        images = plain_memory((len(index), *pixels.shape))
        coded = pixels.missing(index, index, seed=0, epoch=0)
        if coded is not None:
            decode_into(images, coded, self._shards.read_many)
        pixels.complete(images, index, coded)
        return images

    def _pixels_of(self, split: str, size: tuple[int, int], crop: Crop | None) -> Pixels:
        key = (split, size, crop)
        if key not in self._pixels:
            index = self.dataset.index(split)
            dataset = self.dataset
            shape = (*size, dataset.channels if isinstance(dataset, Mixture) else dataset.manifest.channels)
            in_file = self._workers.memory is not None and self._cache_bytes > 0 and crop is None
            file = open_pixel_file(self._shards, index, shape) if in_file else None
            free_bytes = self._cache_bytes - sum(pixels.memory_bytes for pixels in self._pixels.values())
            capacity = min(len(index), max(0, free_bytes) // math.prod(shape)) if crop is None else 0
            self._pixels[key] = Pixels(index, shape, crop, capacity=capacity, file=file)
        return self._pixels[key]
