"""Decides after each step whether a checkpoint is due and whether to stop, identically on all ranks.

Each rank sets its own flags. An asynchronous 8-byte all-reduce combines them; its result is read one or more steps
later, so no rank waits for it. A thread reports this rank's progress to the board every second and receives the
requests of the driver and of Ray's controller.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from pipelines.cluster.monitor import FAILED, STOPS, Beat, Orders

BEAT_S = 1.0
CHECKPOINT = 1
BITS = {stop: 2 << place for place, stop in enumerate(STOPS)}  # if two are set, the lower one counts
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Wants:
    """What the training must do after the current step."""

    checkpoint: bool = False
    stop: str = ""
    """Why to stop after writing a checkpoint of this step; empty: continue."""


NOTHING = Wants()


class Writer(Protocol):
    """Stores checkpoints."""

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is still being written."""


class Stopped(Exception):  # noqa: N818  (a requested stop, not an error)
    """The training stopped on request, after writing a checkpoint of its last step."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason, step)  # pickling needs the arguments
        self.reason, self.step = reason, step

    def __str__(self) -> str:
        return f"the training stopped at step {self.step} ({self.reason})"


class UntilTheEnd:
    """Trains to the last epoch without external control; checkpoints are written only at the end of each epoch."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        """Called after the training."""

    def begin(self, step: int) -> None:
        """Sets the number of steps completed at the start: 0, or the step of a checkpoint."""

    def wants(self, step: int, writer: Writer) -> Wants:
        """Returns what all ranks must do after `step` (counted from the beginning of the training).

        May be called again for the same step during validation, equally often on all ranks.
        """
        return NOTHING

    def give_up(self) -> bool:
        """Asks all ranks to stop at a common checkpoint because this rank cannot continue.

        Returns whether the other ranks can be reached; if not, this rank has to stop alone.
        """
        return False

    def saved(self, step: int) -> None:
        """Reports that the checkpoint of `step` is complete in the store. Rank 0 only, from any thread."""

    def fetched(self, items: Iterable[Item]) -> Iterable[Item]:
        """Yields `items`; the time until each arrives is reported as waiting for data."""
        return items

    def counted(self, work: Callable[..., Result]) -> Callable[..., Result]:
        """Wraps `work` so that each call counts as progress."""
        return work

    def busy(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Context for slow work between steps, such as validation or writing a checkpoint."""
        return contextlib.nullcontext()


class Union(Protocol):
    """Combines the flags of all ranks."""

    lag: int
    """Steps between submitting flags and reading their union."""

    def of(self, flags: int) -> int:
        """Submits this rank's flags for one step; returns the union over all ranks of `lag` steps before."""

    def close(self) -> None:
        """Waits for pending reductions."""


class OwnFlags:
    """The union for a single rank."""

    lag = 0

    def of(self, flags: int) -> int:
        """See Union."""
        return flags

    def close(self) -> None:
        """See Union."""


class SharedFlags:
    """The union over a gloo group separate from the one that averages gradients."""

    def __init__(self, *, lag: int = 1) -> None:
        """Collective: every rank constructs it at the same time.

        `lag` is how many steps pass until flags are read: hosts run several steps ahead of their GPUs and of each
        other.
        """
        import torch
        import torch.distributed as dist

        self._dist, self._torch, self.lag = dist, torch, lag
        self._group = dist.new_group(backend="gloo")
        self._under_way: deque[tuple[Any, Any]] = deque()

    def of(self, flags: int) -> int:
        """See Union."""
        mine = self._torch.tensor([flags], dtype=self._torch.int64)
        work = self._dist.all_reduce(mine, op=self._dist.ReduceOp.BOR, group=self._group, async_op=True)
        self._under_way.append((work, mine))
        return self._oldest() if len(self._under_way) > self.lag else 0

    def close(self) -> None:
        """See Union."""
        while self._under_way:
            self._oldest()

    def _oldest(self) -> int:
        work, found = self._under_way.popleft()
        work.wait()
        return int(found.item())


class Control(UntilTheEnd):
    """The control of one rank. Use `with control: ...` around the training."""

    def __init__(
        self,
        rank: int,
        union: Union,
        *,
        board: Any = None,
        checkpoint_s: float = 0.0,
        checkpoint_steps: int = 0,
        flag: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A checkpoint is due `checkpoint_s` seconds or `checkpoint_steps` steps after the last one; 0 disables either.

        `flag` is polled every second and returns why this rank wants to stop, or "".
        """
        self._rank, self._union, self._board, self._clock, self._flag = rank, union, board, clock, flag
        self._checkpoint_s, self._checkpoint_steps = checkpoint_s, checkpoint_steps
        self._step, self._moves = -1, 0
        self._doing, self._slow = "starting", True
        self._flags, self._lock = 0, threading.Lock()
        self._due_since, self._steps_since = clock(), 0
        self._asked_since = 0  # calls of `wants` since the last checkpoint
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._over.set()
        if self._board is not None:
            with contextlib.suppress(Exception):  # broad: the board may be gone in any way that Ray has
                # The last beat is up to a second old, and the steps since then must count as lost.
                self._board.beat.remote(self._rank, self._sign())
                self._board.done.remote(self._rank)
        if kind is None or kind is Stopped:
            # Without an error all ranks end at the same step; after one, others may never start their reduction.
            self._union.close()
        self._thread.join(3 * BEAT_S)

    def begin(self, step: int) -> None:
        """See UntilTheEnd."""
        self._step = step

    def wants(self, step: int, writer: Writer) -> Wants:
        """See UntilTheEnd."""
        if step != self._step:
            self._step, self._steps_since = step, self._steps_since + 1
            self.at("training")
        self._asked_since += 1
        if self._is_due() and not writer.is_busy:
            self._set(CHECKPOINT)
        found = self._union.of(self._flags)
        stop = next((name for name, bit in BITS.items() if found & bit), "")
        # A request repeats in every call until its union is read; repeats of one already served are ignored.
        if not stop and (not found or self._asked_since <= self._union.lag):
            return NOTHING
        with self._lock:
            self._flags &= ~CHECKPOINT
        self._due_since, self._steps_since, self._asked_since = self._clock(), 0, 0
        return Wants(checkpoint=True, stop=stop)

    def give_up(self) -> bool:
        """See UntilTheEnd."""
        self._set(BITS[FAILED])
        return True

    def saved(self, step: int) -> None:
        """See UntilTheEnd."""
        self._due_since = self._clock()  # epoch checkpoints reset the timer too
        if self._board is not None:
            with contextlib.suppress(Exception):  # broad: the board may be gone in any way that Ray has
                self._board.saved.remote(step)

    def at(self, doing: str, *, slow: bool = False) -> None:
        """Counts as progress and sets the current activity; a `slow` one may show no progress for a long time."""
        self._doing, self._slow, self._moves = doing, slow, self._moves + 1

    def fetched(self, items: Iterable[Item]) -> Iterator[Item]:
        """See UntilTheEnd."""
        waiting = iter(items)
        while True:
            if self._doing != "starting":  # the first step also waits for data and compiles
                self.at("waiting for data", slow=True)
            item = next(waiting, _END)
            if item is _END:
                return
            if self._doing != "starting":
                self.at("training")
            yield item  # type: ignore[misc]

    def counted(self, work: Callable[..., Result]) -> Callable[..., Result]:
        """See UntilTheEnd."""

        def call(*given: Any) -> Result:
            self._moves += 1
            return work(*given)

        return call

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """See UntilTheEnd."""
        self.at(doing, slow=True)
        yield
        self.at("training")

    def _is_due(self) -> bool:
        """Rank 0 decides by its clock; the others follow."""
        if self._rank > 0:
            return False
        by_steps = 0 < self._checkpoint_steps <= self._steps_since + self._union.lag
        return by_steps or 0 < self._checkpoint_s <= self._clock() - self._due_since

    def _beat_on(self) -> None:
        """Reports progress to the board every second and applies its requests."""
        while not self._over.wait(BEAT_S):
            if stop := self._flag():
                self._set(BITS[stop])
            with contextlib.suppress(Exception):  # broad: the thread must survive a board that is away
                self._obey(self._beat())

    def _beat(self) -> Orders:
        if self._board is None:
            return Orders()
        import ray

        return ray.get(self._board.beat.remote(self._rank, self._sign()), timeout=10 * BEAT_S)

    def _sign(self) -> Beat:
        return Beat(os.getpid(), self._step, self._moves, self._doing, self._slow)

    def _obey(self, orders: Orders) -> None:
        if orders.stop:
            self._set(BITS[orders.stop])

    def _set(self, bit: int) -> None:
        with self._lock:
            self._flags |= bit


_END = object()
