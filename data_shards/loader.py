"""Manifest -> this rank's batches: in an order that only (seed, epoch) decides, resumable at a position.

A global batch is cut into micro-batches; rank r of R takes micro-batches r, r + R, ... of every global batch. What a
micro-batch holds therefore does not depend on the number of ranks, and every rank gets equally many.
Images are stretched to one size (their aspect ratio is not kept), or a random part of each is brought to it.
Legend: B micro-batch, H height, W width, C channels (1 grey or 3 RGB).
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data_shards.decode_pool import DecodePool, DecodeProcessError
from data_shards.local_shard import LocalShards
from data_shards.manifest import Dataset, SplitIndex
from data_shards.mixture import Mixture
from data_shards.order import even_quotas, mixed, padded, shuffled, visits
from data_shards.pixels import Coded, Crop, crop_boxes, decode_into

Sampling = Literal["shuffled", "balanced"]
"""shuffled: each sample once an epoch; balanced: each class equally often, samples of rare classes several times."""

CACHE_BYTES = 512 << 20
# A decoding process takes about 0.4 s of a processor to start, so few or small images are decoded by threads.
PROCESSES_FROM_S = 4.0
_IMAGE_S, _PIXEL_S = 60e-6, 2.5e-9  # what decoding takes: for each image, and for each of its H x W x C numbers


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `consumed`: samples of the epoch done, over all ranks, once its global batch is done."""

    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray  # (B, num_classes) uint8, 1 where the sample is of the class
    index: np.ndarray  # (B,) int64, position in the split's index; -1 where padded
    chance: np.ndarray  # (B,) int64, which random numbers are the sample's: `index`, another for each time it comes
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
    seed: int
    epoch: int
    num_samples: int
    batch: int
    micro: int
    rank: int
    ranks: int
    start: int
    workers: int
    processes: bool | None
    empty: Callable[[tuple[int, ...]], np.ndarray] | None

    def __len__(self) -> int:
        return len(self._cuts)

    def __iter__(self) -> Iterator[Batch]:
        if self.workers == 0:
            return map(self._made, self._cuts)
        if self.decodes_in_processes:
            # Put together by one thread, so that copying, too, goes on beside the training.
            decoded = self._decoded()
            return _ahead(lambda _: next(decoded), self._cuts, threads=1, close=decoded.close)
        return _ahead(self._made, self._cuts, threads=self.workers)

    @property
    def decodes_in_processes(self) -> bool:
        """Whether `workers` are processes: where decoding what is left of the epoch is worth their start."""
        if self.processes is not None:
            return self.processes and self.workers > 0
        left = self.order[np.add.outer(np.array(self._cuts, np.int64), np.arange(self.micro))]
        return self.workers > 0 and self.pixels.decoding_s(left[left >= 0]) >= PROCESSES_FROM_S

    @functools.cached_property
    def _cuts(self) -> list[int]:
        """Where each micro-batch of this rank begins in `order`."""
        return [
            first + cut
            for first in range(self.start, len(self.order), self.batch)
            for cut in range(self.rank * self.micro, self.batch, self.ranks * self.micro)
        ]

    @functools.cached_property
    def _chance(self) -> np.ndarray:
        return self.order + visits(self.order) * len(self.labels)

    def _made(self, cut: int) -> Batch:
        """A batch, decoded here as far as it is not in memory."""
        coded = self._missing(cut)
        images = (self.empty or _empty)((self.micro, *self.pixels.shape))
        if coded is not None:
            decode_into(images, coded, self.pixels.shards.read_many)
        return self._batch(images, coded, cut)

    def _decoded(self) -> Generator[Batch, None, None]:
        """The batches, decoded by processes as far as they are not in memory."""
        pool = self.pixels.take_pool(self.workers, self.micro)
        waiting: deque[tuple[int, Coded | None]] = deque()
        try:
            for cut in self._cuts:
                if len(waiting) == pool.depth:
                    yield self._finished(pool, *waiting.popleft())
                waiting.append((cut, coded := self._missing(cut)))
                if coded is not None:
                    pool.put(coded)
            while waiting:
                yield self._finished(pool, *waiting.popleft())
        except GeneratorExit:  # left early, or the whole program ends and the processes are gone already
            with contextlib.suppress(DecodeProcessError):
                pool.drain()
                self.pixels.give_pool(pool)
            raise
        except BaseException:
            pool.close()
            raise
        self.pixels.give_pool(pool)

    def _finished(self, pool: DecodePool, cut: int, coded: Coded | None) -> Batch:
        found = pool.take() if coded is not None else None
        if found is not None and coded is not None and len(coded.row) == self.micro and self.empty is None:
            return self._batch(found, coded, cut)  # as it lies in the memory shared with the process
        images = (self.empty or _empty)((self.micro, *self.pixels.shape))
        if found is not None and coded is not None:
            images[coded.row] = found[coded.row]
        return self._batch(images, coded, cut)

    def _missing(self, cut: int) -> Coded | None:
        at = slice(cut, cut + self.micro)
        return self.pixels.missing(self.order[at], self._chance[at], seed=self.seed, epoch=self.epoch)

    def _batch(self, images: np.ndarray, coded: Coded | None, cut: int) -> Batch:
        at = slice(cut, cut + self.micro)
        index, mask = self.order[at], self.order[at] >= 0
        self.pixels.complete(images, index, coded)
        labels = self.labels[index]
        labels[~mask] = 0
        done = (cut // self.batch + 1) * self.batch
        return Batch(images, labels, index, self._chance[at], mask, self.epoch, min(done, self.num_samples))


def batches(
    dataset: Dataset | Mixture,
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
    sampling: Sampling = "shuffled",
    crop: Crop | None = None,
    workers: int = 1,
    processes: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
    disk_bytes: int = 0,
    empty: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> Batches:
    """The micro-batches of one rank for one epoch of a split.

    Args:
        dataset: From `open_dataset`, or several of them from `mix`; it keeps what is decoded, and the decoding
            processes, for the next epochs.
        split: train, val or test.
        batch: Samples of a global batch, over all ranks.
        image_size: Side, or (height, width), in pixels.
        train: Shuffled from (seed, epoch), the incomplete last global batch dropped; else in the order of the index,
            the last global batch padded (zeros, `mask` False).
        micro: Samples of a micro-batch; default `batch / ranks`.
        rank: Which of the ranks this is.
        ranks: How many there are.
        seed: Of the whole training.
        epoch: Counted from 0; with `seed` it decides the order, and which part of an image `crop` takes.
        start: Samples of the epoch already consumed: the `consumed` of the last batch seen.
        sampling: How often each sample comes in a training epoch; its length is the same.
        crop: Take a random part of each image instead of stretching the whole.
        workers: What makes batches ahead, threads or processes; 0 makes each when it is asked for.
        processes: Whether the workers are processes; None: where there is so much to decode that it pays.
        cache_bytes: Memory for decoded whole images of this dataset, kept from epoch to epoch.
        disk_bytes: What copies of remote shards may take on this machine's disk, of all datasets together; 0: half of
            what is free. What does not fit is read image by image. The dataset's first call decides.
        empty: Makes the uint8 array of a batch from its shape, where it shall lie in memory of a special kind.

    Raises:
        ValueError: the batch cannot be cut evenly, no training batch fits, `start` is not between two global batches,
            or classes of a multilabel dataset shall be balanced.
        ShardError: a shard is missing or damaged (raised while iterating).
        DecodeProcessError: a decoding process was killed (raised while iterating).
    """
    index = dataset.index(split)
    micro = _micro_batch(batch, micro, ranks)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}, but with {ranks} ranks it must be from 0 to {ranks - 1}")
    if train:
        _check_training(len(index), batch, split)
        order = _training_order(dataset, split, sampling, seed, epoch)[: len(index) // batch * batch]
    else:
        order = padded(len(index), batch)
    num_samples = len(order) if train else len(index)
    if not (0 <= start <= num_samples and (start % batch == 0 or start == num_samples)):
        raise ValueError(
            f"start is {start}, but an epoch of {split!r} ({num_samples} samples in batches of {batch}) can only be "
            f"entered between two batches: give a multiple of {batch} up to {num_samples}, as it stands in `consumed`"
        )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return Batches(
        pixels=_pixels(dataset, split, height, width, crop, cache_bytes, disk_bytes),
        labels=index.labels,
        order=order,
        seed=seed,
        epoch=epoch,
        num_samples=num_samples,
        batch=batch,
        micro=micro,
        rank=rank,
        ranks=ranks,
        start=len(order) if start == num_samples else start,
        workers=workers,
        processes=processes,
        empty=empty,
    )


def read_images(dataset: Dataset, split: str, index: np.ndarray, *, image_size: int) -> np.ndarray:
    """The images (len(index), H, W, C) uint8 at these positions of the split's index, stretched to `image_size`."""
    pixels = _pixels(dataset, split, image_size, image_size, None, CACHE_BYTES)
    images = _empty((len(index), *pixels.shape))
    coded = pixels.missing(index, index, seed=0, epoch=0)
    if coded is not None:
        decode_into(images, coded, pixels.shards.read_many)
    pixels.complete(images, index, coded)
    return images


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


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


def _check_training(num_samples: int, batch: int, split: str) -> None:
    if num_samples < batch:
        raise ValueError(
            f"the split {split!r} holds {num_samples} samples, but a training batch takes {batch} and an incomplete "
            f"one is dropped: make the batch at most {num_samples}"
        )


def _training_order(dataset: Dataset | Mixture, split: str, sampling: Sampling, seed: int, epoch: int) -> np.ndarray:
    """As many positions as the split has samples."""
    index = dataset.index(split)
    if sampling == "balanced":
        if (index.labels.sum(1) != 1).any():
            raise ValueError(
                "balanced sampling draws by class, but these samples have several classes or none: use 'shuffled'"
            )
        pools = [np.flatnonzero(index.labels[:, number]) for number in range(index.labels.shape[1])]
        pools = [pool for pool in pools if len(pool)]
        return mixed(pools, even_quotas(len(index), [1] * len(pools)), seed, epoch)
    if isinstance(dataset, Mixture) and dataset.weights is not None:
        return mixed(dataset.members(split), even_quotas(len(index), dataset.weights), seed, epoch)
    return shuffled(len(index), seed, epoch)


def _ahead(
    make: Callable[[int], Batch], cuts: list[int], *, threads: int, close: Callable[[], None] = lambda: None
) -> Iterator[Batch]:
    """`make(cut)` for each cut, made ahead by threads, handed out in order."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    ahead: deque[Future[Batch]] = deque()
    try:
        for cut in cuts:
            ahead.append(pool.submit(make, cut))
            if len(ahead) > threads + 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        close()


class _Pixels:
    """The images of a split at one size, the first `capacity` of the index kept in memory once decoded.

    Every epoch visits every sample once, so a fixed part of the split is hit as often as the best cache of that size.
    Random parts differ from epoch to epoch and are not kept.
    """

    def __init__(self, index: SplitIndex, opened: _Opened, shape: tuple[int, int, int], crop, cache_bytes: int):
        self.index, self.shape, self.crop = index, shape, crop
        self.shards, self._opened = opened.shards, opened
        self.capacity = min(len(index), max(0, cache_bytes) // math.prod(shape)) if crop is None else 0
        self.cached = np.empty((self.capacity, *shape), np.uint8)  # memory is taken page by page as it fills
        self.is_cached = np.zeros(len(index), bool)

    def missing(self, index: np.ndarray, chance: np.ndarray, *, seed: int, epoch: int) -> Coded | None:
        """What of these positions is not in memory."""
        row = np.flatnonzero(~self.is_cached[index] & (index >= 0))
        if not len(row):
            return None
        of, at = self.index, index[row]
        boxes = None
        if self.crop is not None:
            boxes = crop_boxes(self.crop, of.height[at], of.width[at], seed=seed, epoch=epoch, sample=chance[row])
        return Coded(row, of.shard[at], of.offset[at], of.size[at], boxes)

    def complete(self, images: np.ndarray, index: np.ndarray, coded: Coded | None) -> None:
        """Adds what was in memory to images that hold what was decoded, and remembers the latter."""
        if coded is None and len(index) and index.min() >= 0:
            np.take(self.cached, index, axis=0, out=images)
            return
        row = np.arange(len(index))
        if coded is not None:
            row = np.delete(row, coded.row)
            kept = coded.row[index[coded.row] < self.capacity]
            self.cached[index[kept]] = images[kept]
            self.is_cached[index[kept]] = True  # after the pixels: another thread may look
        known = row[index[row] >= 0]
        images[known] = self.cached[index[known]]
        images[row[index[row] < 0]] = 0

    def decoding_s(self, index: np.ndarray) -> float:
        """About how long one process decodes what is missing of these positions."""
        missing = index[~self.is_cached[index]]
        of = self.index
        numbers = (of.height[missing] * of.width[missing] * of.channels[missing]).sum()
        return len(missing) * _IMAGE_S + float(numbers) * _PIXEL_S

    def take_pool(self, processes: int, micro: int) -> DecodePool:
        """Processes that nobody else uses now."""
        return self._opened.take_pool(processes, (micro, *self.shape))

    def give_pool(self, pool: DecodePool) -> None:
        """Keeps them for the next epoch."""
        self._opened.pools.append(pool)


@dataclass
class _Opened:
    shards: LocalShards
    pixels: dict[tuple[str, int, int, Crop | None], _Pixels] = field(default_factory=dict)
    pools: list[DecodePool] = field(default_factory=list)

    def take_pool(self, processes: int, shape: tuple[int, ...]) -> DecodePool:
        """Processes that nobody else uses now; those for other batches end."""
        while self.pools:
            pool = self.pools.pop()
            if (pool.processes, pool.shape) == (processes, shape):
                return pool
            pool.close()
        return DecodePool(self.shards, processes, shape)


# Gone with its dataset; until then later epochs find what earlier ones opened and decoded.
_opened: weakref.WeakKeyDictionary[Dataset | Mixture, _Opened] = weakref.WeakKeyDictionary()


def _pixels(
    dataset: Dataset | Mixture,
    split: str,
    height: int,
    width: int,
    crop: Crop | None,
    cache_bytes: int,
    disk_bytes: int = 0,
) -> _Pixels:
    if isinstance(dataset, Mixture):
        shards, channels = dataset.shards, dataset.channels
    else:
        shards = [(dataset.store, shard) for shard in dataset.manifest.shards]
        channels = dataset.manifest.channels
    if dataset not in _opened:
        _opened[dataset] = _Opened(LocalShards(shards, disk_bytes))
    opened = _opened[dataset]
    key = (split, height, width, crop)
    if key not in opened.pixels:
        free_bytes = cache_bytes - sum(pixels.cached.nbytes for pixels in opened.pixels.values())
        opened.pixels[key] = _Pixels(dataset.index(split), opened, (height, width, channels), crop, free_bytes)
    return opened.pixels[key]
