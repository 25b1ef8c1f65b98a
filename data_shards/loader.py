"""Manifest -> this rank's batches: in an order that only (seed, epoch) decides, resumable at a position.

A global batch is cut into micro-batches; rank r of R takes micro-batches r, r + R, ... of every global batch. What a
micro-batch holds therefore does not depend on the number of ranks, and every rank gets equally many.
Images are stretched to one size (their aspect ratio is not kept) with PIL's antialiased bilinear filter.
Legend: B micro-batch, H height, W width, C channels (1 grey or 3 RGB).
"""

from __future__ import annotations

import io
import math
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_shards.local_shard import LocalShards
from data_shards.manifest import Dataset, SplitIndex

CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `consumed`: samples of the epoch done, over all ranks, once its global batch is done."""

    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray  # (B, num_classes) uint8, 1 where the sample is of the class
    index: np.ndarray  # (B,) int64, position in the split's index; -1 where padded
    mask: np.ndarray  # (B,) bool, False where padded
    epoch: int
    consumed: int


@dataclass(frozen=True)
class Batches:
    """What `batches` returns: iterate to get the micro-batches of this rank (each time from the start), `len` of them.

    `order` holds the split's positions from the first sample to the last of the epoch, padding as -1.
    """

    pixels: _Pixels
    labels: np.ndarray
    order: np.ndarray
    epoch: int
    num_samples: int
    batch: int
    micro: int
    rank: int
    ranks: int
    start: int
    workers: int

    def __len__(self) -> int:
        return len(self._cuts)

    def __iter__(self) -> Iterator[Batch]:
        if self.workers == 0:
            yield from map(self._made, self._cuts)
            return
        # Made ahead by threads, handed out in order. Decoding and resizing in PIL release the GIL.
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        ahead: deque[Future[Batch]] = deque()
        try:
            for cut in self._cuts:
                ahead.append(pool.submit(self._made, cut))
                if len(ahead) > self.workers + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _cuts(self) -> list[int]:
        """Where each micro-batch of this rank begins in `order`."""
        return [
            first + cut
            for first in range(self.start, len(self.order), self.batch)
            for cut in range(self.rank * self.micro, self.batch, self.ranks * self.micro)
        ]

    def _made(self, cut: int) -> Batch:
        index = self.order[cut : cut + self.micro]
        mask = index >= 0
        images, labels = self.pixels.gather(index), self.labels[index]
        labels[~mask] = 0
        done = (cut // self.batch + 1) * self.batch
        return Batch(images, labels, index, mask, self.epoch, min(done, self.num_samples))


def batches(
    dataset: Dataset,
    split: str,
    *,
    batch: int,
    image_size: int | tuple[int, int],
    train: bool,
    micro: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    workers: int = 1,
    cache_bytes: int = CACHE_BYTES,
) -> Batches:
    """The micro-batches of one rank for one epoch of a split.

    Args:
        dataset: From `open_dataset`; it keeps what is decoded for the next epochs.
        split: train, val or test.
        batch: Samples of a global batch, over all ranks.
        image_size: Side, or (height, width), in pixels.
        train: Shuffled from (seed, epoch), the incomplete last global batch dropped; else in the order of the index,
            the last global batch padded (zeros, `mask` False).
        micro: Samples of a micro-batch; default `batch / ranks`.
        rank: Which of the ranks this is.
        ranks: How many there are.
        seed: Of the whole training.
        epoch: Counted from 0; with `seed` it decides the order.
        start: Samples of the epoch already consumed: the `consumed` of the last batch seen.
        workers: Threads that make batches ahead; 0 makes each when it is asked for.
        cache_bytes: Memory for decoded images of this dataset, kept from epoch to epoch.

    Raises:
        ValueError: the batch cannot be cut evenly, no training batch fits, `start` is not between two global batches.
        ShardError: a shard is missing or damaged (raised while iterating).
    """
    index = dataset.index(split)
    micro = _micro_batch(batch, micro, ranks)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}, but with {ranks} ranks it must be from 0 to {ranks - 1}")
    order = _training_order(len(index), batch, seed, epoch, split) if train else _padded_order(len(index), batch)
    num_samples = len(order) if train else len(index)
    if not (0 <= start <= num_samples and (start % batch == 0 or start == num_samples)):
        raise ValueError(
            f"start is {start}, but an epoch of {split!r} ({num_samples} samples in batches of {batch}) can only be "
            f"entered between two batches: give a multiple of {batch} up to {num_samples}, as it stands in `consumed`"
        )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = _pixels(dataset, split, height, width, cache_bytes)
    start = len(order) if start == num_samples else start
    return Batches(
        pixels, index.labels, order, epoch, num_samples, batch, micro, rank, ranks, start=start, workers=workers
    )


def read_images(dataset: Dataset, split: str, index: np.ndarray, *, image_size: int) -> np.ndarray:
    """The images (len(index), H, W, C) uint8 at these positions of the split's index, stretched to `image_size`."""
    return _pixels(dataset, split, image_size, image_size, CACHE_BYTES).gather(index)


def _micro_batch(batch: int, micro: int | None, ranks: int) -> int:
    if batch < 1 or ranks < 1 or (micro is not None and micro < 1):
        raise ValueError(f"batch {batch}, micro-batch {micro} and ranks {ranks} must each be at least 1")
    if batch % ((micro or 1) * ranks):
        cut = f"{ranks} ranks" if micro is None else f"{ranks} ranks x micro-batches of {micro}"
        raise ValueError(
            f"the global batch of {batch} samples cannot be cut evenly into {cut}: make it a multiple of "
            f"{(micro or 1) * ranks}, or use fewer workers or a smaller micro-batch"
        )
    return micro or batch // ranks


def _training_order(num_samples: int, batch: int, seed: int, epoch: int, split: str) -> np.ndarray:
    """A permutation of the split's positions, cut to whole global batches."""
    if num_samples < batch:
        raise ValueError(
            f"the split {split!r} holds {num_samples} samples, but a training batch takes {batch} and an incomplete "
            f"one is dropped: make the batch at most {num_samples}"
        )
    # Sorting raw draws, because numpy promises their stream for ever but not that of Generator.permutation.
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(draws, kind="stable")[: num_samples // batch * batch]


def _padded_order(num_samples: int, batch: int) -> np.ndarray:
    return np.concatenate([np.arange(num_samples), np.full(-num_samples % batch, -1)]).astype(np.int64)


class _Pixels:
    """The images of a split at one size, the first `capacity` of the index kept in memory once decoded.

    Every epoch visits every sample once, so a fixed part of the split is hit as often as the best cache of that size.
    """

    def __init__(self, index: SplitIndex, shards: LocalShards, shape: tuple[int, int, int], cache_bytes: int):
        self.index, self.shards, self.shape = index, shards, shape
        self.capacity = min(len(index), max(0, cache_bytes) // math.prod(shape))
        self.cached = np.empty((self.capacity, *shape), np.uint8)  # memory is taken page by page as it fills
        self.is_cached = np.zeros(len(index), bool)

    def gather(self, index: np.ndarray) -> np.ndarray:
        """The images (B, H, W, C) at these positions, zeros where the position is -1."""
        if index.min() >= 0 and self.is_cached[index].all():
            return self.cached[index]
        images = np.zeros((len(index), *self.shape), np.uint8)
        for row, position in enumerate(index.tolist()):
            if position >= 0:
                images[row] = self.cached[position] if self.is_cached[position] else self._decoded(position)
        return images

    def _decoded(self, position: int) -> np.ndarray:
        index = self.index
        data = self.shards.read(int(index.shard[position]), int(index.offset[position]), int(index.size[position]))
        pixels = resized(data, *self.shape)
        if position < self.capacity:
            self.cached[position] = pixels
            self.is_cached[position] = True  # after the pixels: another thread may look
        return pixels


def resized(data: bytes, height: int, width: int, channels: int) -> np.ndarray:
    """A shard's coded image as (height, width, channels) uint8 pixels; grey is repeated where RGB is asked for."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels)


@dataclass(frozen=True)
class _Opened:
    shards: LocalShards
    pixels: dict[tuple[str, int, int], _Pixels]


# Gone with its dataset; until then later epochs find what earlier ones opened and decoded.
_opened: weakref.WeakKeyDictionary[Dataset, _Opened] = weakref.WeakKeyDictionary()


def _pixels(dataset: Dataset, split: str, height: int, width: int, cache_bytes: int) -> _Pixels:
    if dataset not in _opened:
        _opened[dataset] = _Opened(LocalShards(dataset.store, dataset.manifest), {})
    opened = _opened[dataset]
    if (split, height, width) not in opened.pixels:
        free_bytes = cache_bytes - sum(pixels.cached.nbytes for pixels in opened.pixels.values())
        shape = (height, width, dataset.manifest.channels)
        opened.pixels[split, height, width] = _Pixels(dataset.index(split), opened.shards, shape, free_bytes)
    return opened.pixels[split, height, width]
