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
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data_shards.loader.decode_pool import DecodePool, DecodeProcessError, Ticket
from data_shards.loader.local_shard import LocalShards
from data_shards.loader.mixture import Mixture
from data_shards.loader.order import even_quotas, mixed, padded, shuffled, visits
from data_shards.loader.pixel_cache import Pixels, open_pixel_file
from data_shards.loader.pixels import Coded, Crop, decode_into
from data_shards.manifest import Dataset

Sampling = Literal["shuffled", "balanced"]
"""shuffled: each sample once an epoch; balanced: each class equally often, samples of rare classes several times."""

CACHE_BYTES = 512 << 20
# A decoding process takes about 0.4 s of a processor to start, so few or small images are decoded by threads.
PROCESSES_FROM_S = 4.0
# Beside a GPU the processes also put larger batches of decoded images together, in memory that it copies from.
_GATHER_BYTES = 1 << 20


@dataclass(frozen=True)
class GpuMemory:
    """Memory from which a GPU copies while it computes; giving it says that this process drives one."""

    empty: Callable[[tuple[int, ...]], np.ndarray]
    """Makes the uint8 array of a batch from its shape."""
    lock: Callable[[np.ndarray], Callable[[], None] | None] = lambda memory: None
    """Turns existing memory into such memory and returns what undoes that; None where it cannot."""


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

    pixels: Pixels
    opened: _Opened
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
    memory: GpuMemory | None
    following: Callable[[], Batches] | None

    def __len__(self) -> int:
        return len(self._cuts)

    def __iter__(self) -> Iterator[Batch]:
        if self.workers == 0:
            return map(self._made, self._cuts)
        if self.decodes_in_processes:
            # Put together by one thread, so that copying, too, goes on beside the training.
            decoded = self._decoded()
            return _ahead(lambda _: next(decoded), self._cuts, threads=1, close=decoded.close)
        # Beside a GPU nothing is left but copying, which one thread does; more would only ask for the GIL.
        return _ahead(self._made, self._cuts, threads=self.workers if self.memory is None else 1)

    @property
    def decodes_in_processes(self) -> bool:
        """Whether `workers` are processes.

        Beside a GPU: where any of the epoch is left to decode, because a thread that decodes takes the GIL from the
        one that drives the GPU. Else: where decoding what is left of the epoch is worth their start.
        """
        if self.processes is not None or self.workers == 0:
            return bool(self.processes) and self.workers > 0
        left = self.order[np.add.outer(np.array(self._cuts, np.int64), np.arange(self.micro))]
        left = left[left >= 0]
        if self.memory is not None:
            return self._gathers or not self.pixels.has(left).all()
        return self.pixels.decoding_s(left) >= PROCESSES_FROM_S

    @property
    def _gathers(self) -> bool:
        """Whether the processes also read what is decoded already."""
        return self.pixels.file is not None and self.micro * math.prod(self.pixels.shape) >= _GATHER_BYTES

    @property
    def _empty(self) -> Callable[[tuple[int, ...]], np.ndarray] | None:
        return None if self.memory is None else self.memory.empty

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
        images = (self._empty or _empty)((self.micro, *self.pixels.shape))
        if coded is not None:
            decode_into(images, coded, self.opened.shards.read_many)
        return self._batch(images, coded, cut)

    def _decoded(self) -> Generator[Batch, None, None]:
        """The batches, decoded by processes as far as they are not in memory; in the end they begin the next epoch."""
        pool, jobs, others = self.opened.take_pool(self)
        next_epoch: _Started | None = None
        to_come = iter(self._cuts[len(jobs) :])
        try:
            for left in range(len(self._cuts), 0, -1):
                while len(jobs) < pool.depth and pool.has_room and (cut := next(to_come, None)) is not None:
                    jobs.append(self._put(pool, cut))
                if len(jobs) == left and self.following is not None:  # all of this epoch is on its way
                    next_epoch = next_epoch or _Started(self.following(), deque())
                    next_epoch.put(pool)
                yield self._finished(pool, jobs.popleft())
        except GeneratorExit:  # left early, or the whole program ends and the processes are gone already
            with contextlib.suppress(DecodeProcessError):
                _drop(jobs, pool)
                self.opened.give_pool(pool, next_epoch, others)
            raise
        except BaseException:
            pool.close()
            raise
        self.opened.give_pool(pool, next_epoch, others)

    def _put(self, pool: DecodePool, cut: int) -> _Job:
        coded = self._missing(cut, gather=self._gathers)
        return _Job(cut, coded, None if coded is None else pool.put(coded))

    def _finished(self, pool: DecodePool, job: _Job) -> Batch:
        if job.ticket is None:
            images = (self._empty or _empty)((self.micro, *self.pixels.shape))
        else:
            images = pool.take(job.ticket, self._empty)
        return self._batch(images, job.coded, job.cut)

    def _missing(self, cut: int, *, gather: bool = False) -> Coded | None:
        at = slice(cut, cut + self.micro)
        return self.pixels.missing(self.order[at], self._chance[at], seed=self.seed, epoch=self.epoch, gather=gather)

    def _is(self, other: Batches) -> bool:
        """Whether both give the same batches."""
        return self.pixels is other.pixels and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("order", "seed", "epoch", "batch", "micro", "rank", "ranks", "start")
        )

    def _batch(self, images: np.ndarray, coded: Coded | None, cut: int) -> Batch:
        at = slice(cut, cut + self.micro)
        index, mask = self.order[at], self.order[at] >= 0
        self.pixels.complete(images, index, coded)
        labels = self.labels[index]
        labels[~mask] = 0
        done = (cut // self.batch + 1) * self.batch
        return Batch(images, labels, index, self._chance[at], mask, self.epoch, min(done, self.num_samples))


@dataclass
class _Job:
    """A micro-batch on its way."""

    cut: int
    coded: Coded | None
    ticket: Ticket | None  # None: nothing of it is left for a process to do


@dataclass
class _Started:
    """An epoch of which the first batches are decoded before it begins."""

    stream: Batches
    jobs: deque[_Job]

    def put(self, pool: DecodePool) -> None:
        """One batch for each process; the pool's other places are for the epoch before and for validation."""
        cuts = self.stream._cuts[len(self.jobs) : pool.processes]
        while cuts and pool.has_room:
            self.jobs.append(self.stream._put(pool, cuts.pop(0)))


def _drop(jobs: Iterable[_Job], pool: DecodePool) -> None:
    """Forgets what nobody will ask for."""
    pool.drain([job.ticket for job in jobs if job.ticket is not None])


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
    memory: GpuMemory | None = None,
    next_epoch: bool = False,
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
        processes: Whether the workers are processes; None: beside a GPU wherever anything is left to decode, else
            where there is so much to decode that it pays.
        cache_bytes: Memory for decoded whole images of this dataset, kept from epoch to epoch; 0: none is kept.
        disk_bytes: What copies of remote shards and decoded images may take on this machine's disk, of all datasets
            together; 0: half of what is free. Shards that do not fit are read image by image. The dataset's first call
            decides.
        memory: What this process's GPU copies from: batches are in such memory, and decoded whole images are kept in a
            file that the processes of this machine share, instead of in `cache_bytes`.
        next_epoch: In training, whether the next epoch is asked for afterwards: decoding processes begin with it while
            the last batches of this one, and a validation, are still in use.

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
    following = None
    if train and next_epoch:
        following = functools.partial(
            batches, dataset, split, batch=batch, image_size=image_size, train=True, micro=micro, rank=rank,
            ranks=ranks, seed=seed, epoch=epoch + 1, sampling=sampling, crop=crop, workers=workers,
            processes=processes, cache_bytes=cache_bytes, disk_bytes=disk_bytes, memory=memory,
        )  # fmt: skip
    in_file = memory is not None and cache_bytes > 0 and crop is None
    opened = _open(dataset, disk_bytes)
    return Batches(
        pixels=_pixels(dataset, opened, split, (height, width), crop, cache_bytes, in_file=in_file),
        opened=opened,
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
        memory=memory,
        following=following,
    )


def read_images(dataset: Dataset, split: str, index: np.ndarray, *, image_size: int) -> np.ndarray:
    """The images (len(index), H, W, C) uint8 at these positions of the split's index, stretched to `image_size`."""
    opened = _open(dataset, 0)
    pixels = _pixels(dataset, opened, split, (image_size, image_size), None, CACHE_BYTES, in_file=False)
    images = _empty((len(index), *pixels.shape))
    coded = pixels.missing(index, index, seed=0, epoch=0)
    if coded is not None:
        decode_into(images, coded, opened.shards.read_many)
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


@dataclass
class _Opened:
    shards: LocalShards
    pixels: dict[tuple[str, int, int, Crop | None, bool], Pixels] = field(default_factory=dict)
    idle: list[tuple[DecodePool, _Started | None]] = field(default_factory=list)

    def take_pool(self, stream: Batches) -> tuple[DecodePool, deque[_Job], _Started | None]:
        """Processes that nobody else uses now, what they have begun of this epoch, or else of another one.

        Those for other batches end.
        """
        shape = (stream.micro, *stream.pixels.shape)
        # Those that have begun with this epoch first.
        self.idle.sort(key=lambda each: each[1] is not None and each[1].stream._is(stream))
        while self.idle:
            pool, started = self.idle.pop()
            if (pool.processes, pool.shape) != (stream.workers, shape):
                pool.close()
            elif started is None or started.stream.pixels is not stream.pixels:
                return pool, deque(), started
            elif started.stream._is(stream):
                return pool, started.jobs, None
            else:  # it will not be asked for any more
                _drop(started.jobs, pool)
                return pool, deque(), None
        lock = stream.memory.lock if stream.memory is not None else None
        return DecodePool(self.shards, stream.workers, shape, lock), deque(), None

    def give_pool(self, pool: DecodePool, started: _Started | None, others: _Started | None) -> None:
        """Keeps the processes for who comes next, with what they have begun of one epoch."""
        if started is not None and others is not None:
            _drop(others.jobs, pool)
        self.idle.append((pool, started or others))


# Gone with its dataset; until then later epochs find what earlier ones opened and decoded.
_opened: weakref.WeakKeyDictionary[Dataset | Mixture, _Opened] = weakref.WeakKeyDictionary()


def _open(dataset: Dataset | Mixture, disk_bytes: int) -> _Opened:
    if dataset not in _opened:
        if isinstance(dataset, Mixture):
            shards = dataset.shards
        else:
            shards = [(dataset.store, shard) for shard in dataset.manifest.shards]
        _opened[dataset] = _Opened(LocalShards(shards, disk_bytes))
    return _opened[dataset]


def _pixels(
    dataset: Dataset | Mixture,
    opened: _Opened,
    split: str,
    size: tuple[int, int],
    crop: Crop | None,
    cache_bytes: int,
    *,
    in_file: bool,
) -> Pixels:
    key = (split, *size, crop, in_file)
    if key not in opened.pixels:
        index = dataset.index(split)
        shape = (*size, dataset.channels if isinstance(dataset, Mixture) else dataset.manifest.channels)
        file = open_pixel_file(opened.shards, index, shape) if in_file else None
        free_bytes = cache_bytes - sum(pixels.memory_bytes for pixels in opened.pixels.values())
        capacity = min(len(index), max(0, free_bytes) // math.prod(shape)) if crop is None else 0
        opened.pixels[key] = Pixels(index, shape, crop, capacity=capacity, file=file)
    return opened.pixels[key]
