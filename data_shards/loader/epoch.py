"""The micro-batches of one epoch, prepared ahead by threads or processes and delivered in order.

Images, or random crops of them, are resized to one size without keeping the aspect ratio.
Legend: B micro-batch, H height, W width, C channels (1 gray or 3 RGB).
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_shards.loader.batch_plan import EpochPlan
from data_shards.loader.decode_pool import DecodePool, DecodeProcessError, Ticket
from data_shards.loader.local_shard import LocalShards
from data_shards.loader.micro_batch import GpuMemory, MicroBatch, plain_memory
from data_shards.loader.pixel_cache import Pixels
from data_shards.loader.pixels import Coded, decode_into

# Starting a decoding process takes about 0.4 s of CPU time, so few or small images are decoded by threads.
PROCESSES_FROM_S = 4.0
# With a GPU, the processes also assemble larger micro-batches of cached images, in memory that the GPU copies from.
GATHER_BYTES = 1 << 20


@dataclass(frozen=True)
class Workers:
    """Settings of the workers; see Loader."""

    number: int
    processes: bool | None
    memory: GpuMemory | None

    @property
    def empty(self) -> Callable[[tuple[int, ...]], np.ndarray] | None:
        """Creates the memory of a micro-batch; None if any memory will do."""
        return None if self.memory is None else self.memory.empty


@dataclass(frozen=True, eq=False)
class Epoch:
    """The micro-batches of this rank; each iteration starts from the beginning, `len` is their number."""

    plan: EpochPlan
    pixels: Pixels
    labels: np.ndarray
    pools: Pools
    workers: Workers
    following: Callable[[], Epoch] | None
    """Creates the next epoch, if it will follow."""

    def __len__(self) -> int:
        return len(self.plan.cuts)

    def __iter__(self) -> Iterator[MicroBatch]:
        if self.workers.number == 0:
            return map(self._make, self.plan.cuts)
        if self.decodes_in_processes:
            # Assembled by one thread, so that copying overlaps with training.
            decoded = self._decoded()
            return _ahead(lambda _: next(decoded), self.plan.cuts, threads=1, close=decoded.close)
        # With a GPU only copying is left; more threads would only compete for the GIL.
        return _ahead(self._make, self.plan.cuts, threads=self.workers.number if self.workers.memory is None else 1)

    @property
    def order(self) -> np.ndarray:
        """The split's positions in the order of the epoch, with padding as -1."""
        return self.plan.order

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, W, C) of a micro-batch."""
        return (self.plan.micro_batch, *self.pixels.shape)

    @property
    def decodes_in_processes(self) -> bool:
        """Whether the workers are processes.

        With a GPU: if anything is left to decode, because decoding threads would take the GIL from the one that drives
        the GPU. Else: if there is enough to decode to justify their start.
        """
        workers = self.workers
        if workers.processes is not None or workers.number == 0:
            return bool(workers.processes) and workers.number > 0
        left = self.plan.left
        if workers.memory is not None:
            return self._gathers or not self.pixels.has(left).all()
        return self.pixels.decoding_s(left) >= PROCESSES_FROM_S

    def put(self, pool: DecodePool, cut: int) -> Job:
        """Sends the images of a micro-batch that are not cached to a process."""
        coded = self._missing(cut, gather=self._gathers)
        return Job(cut, coded, None if coded is None else pool.put(coded))

    def is_same(self, other: Epoch) -> bool:
        """Whether both give the same micro-batches."""
        return self.pixels is other.pixels and self.plan.is_same(other.plan)

    @property
    def _gathers(self) -> bool:
        """Whether the processes also read cached images."""
        return self.pixels.file is not None and math.prod(self.shape) >= GATHER_BYTES

    def _make(self, cut: int) -> MicroBatch:
        """A micro-batch; images that are not cached are decoded in this process."""
        coded = self._missing(cut)
        images = (self.workers.empty or plain_memory)(self.shape)
        if coded is not None:
            decode_into(images, coded, self.pools.shards.read_many)
        return self._complete(images, coded, cut)

    def _decoded(self) -> Generator[MicroBatch, None, None]:
        """The micro-batches, with images that are not cached decoded by processes, which then start the next epoch."""
        pool, jobs, others = self.pools.take(self)
        next_epoch: Started | None = None
        cuts = self.plan.cuts
        to_come = iter(cuts[len(jobs) :])
        try:
            for left in range(len(cuts), 0, -1):
                while len(jobs) < pool.depth and pool.has_room and (cut := next(to_come, None)) is not None:
                    jobs.append(self.put(pool, cut))
                if len(jobs) == left and self.following is not None:  # all of this epoch is in progress
                    next_epoch = next_epoch or Started(self.following(), deque())
                    next_epoch.put(pool)
                yield self._finish(pool, jobs.popleft())
        except GeneratorExit:  # left early, or the program ends and the processes are already gone
            with contextlib.suppress(DecodeProcessError):
                _drop(jobs, pool)
                self.pools.give(pool, next_epoch, others)
            raise
        except BaseException:
            pool.close()
            raise
        self.pools.give(pool, next_epoch, others)

    def _finish(self, pool: DecodePool, job: Job) -> MicroBatch:
        if job.ticket is None:
            images = (self.workers.empty or plain_memory)(self.shape)
        else:
            images = pool.take(job.ticket, self.workers.empty)
        return self._complete(images, job.coded, job.cut)

    def _missing(self, cut: int, *, gather: bool = False) -> Coded | None:
        plan, at = self.plan, self.plan.part(cut)
        return self.pixels.missing(plan.order[at], plan.chance[at], seed=plan.seed, epoch=plan.epoch, gather=gather)

    def _complete(self, images: np.ndarray, coded: Coded | None, cut: int) -> MicroBatch:
        plan, at = self.plan, self.plan.part(cut)
        index, mask = plan.order[at], plan.order[at] >= 0
        self.pixels.complete(images, index, coded)
        labels = self.labels[index]
        labels[~mask] = 0
        return MicroBatch(images, labels, index, plan.chance[at], mask, plan.epoch, plan.consumed(cut))


@dataclass(frozen=True)
class Job:
    """A micro-batch in progress."""

    cut: int
    coded: Coded | None
    ticket: Ticket | None  # None: nothing to decode


@dataclass(frozen=True)
class Started:
    """An epoch whose first micro-batches are decoded before it begins."""

    epoch: Epoch
    jobs: deque[Job]

    def put(self, pool: DecodePool) -> None:
        """Sends one micro-batch to each process; other slots remain for the current epoch and for validation."""
        for cut in self.epoch.plan.cuts[len(self.jobs) : pool.processes]:
            if not pool.has_room:
                return
            self.jobs.append(self.epoch.put(pool, cut))


class Pools:
    """The decoding processes of a loader between epochs, with the epochs they have started."""

    def __init__(self, shards: LocalShards):
        self.shards = shards
        self._idle: list[tuple[DecodePool, Started | None]] = []
        self._is_closed = False

    @property
    def begun(self) -> list[Started]:
        """Epochs that processes have started but that have not been requested yet."""
        return [started for _, started in self._idle if started is not None]

    def take(self, epoch: Epoch) -> tuple[DecodePool, deque[Job], Started | None]:
        """Idle processes, their jobs of this epoch, and another epoch that they have started.

        Ends idle processes that are made for other batches.
        """
        # Processes that have started this epoch come first.
        self._idle.sort(key=lambda each: each[1] is not None and each[1].epoch.is_same(epoch))
        while self._idle:
            pool, started = self._idle.pop()
            if (pool.processes, pool.shape) != (epoch.workers.number, epoch.shape):
                pool.close()
            elif started is None or started.epoch.pixels is not epoch.pixels:
                return pool, deque(), started
            elif started.epoch.is_same(epoch):
                return pool, started.jobs, None
            else:  # it will not be requested any more
                _drop(started.jobs, pool)
                return pool, deque(), None
        lock = epoch.workers.memory.lock if epoch.workers.memory is not None else None
        return DecodePool(self.shards, epoch.workers.number, epoch.shape, lock), deque(), None

    def give(self, pool: DecodePool, started: Started | None, others: Started | None) -> None:
        """Returns processes for later use, with at most one epoch that they have started."""
        if self._is_closed:
            pool.close()
            return
        if started is not None and others is not None:
            _drop(others.jobs, pool)
        self._idle.append((pool, started or others))

    def close(self) -> None:
        """Ends idle processes; others end when they are returned."""
        self._is_closed = True
        while self._idle:
            self._idle.pop()[0].close()


def _drop(jobs: Iterable[Job], pool: DecodePool) -> None:
    """Discards jobs that will not be requested."""
    pool.drain([job.ticket for job in jobs if job.ticket is not None])


def _ahead(
    make: Callable[[int], MicroBatch], cuts: Sequence[int], *, threads: int, close: Callable[[], None] = lambda: None
) -> Iterator[MicroBatch]:
    """`make(cut)` for each cut, computed ahead by threads, in order."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    ahead: deque[Future[MicroBatch]] = deque()
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
