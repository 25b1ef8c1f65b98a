"""What a training asks once a step: is a checkpoint due, must it stop? The same answer on all ranks at the same step.

Each rank has flags of its own. Their union travels in a reduction of eight bytes that is started at one step and read
at a later one, when it has long arrived: no rank waits for it. A thread tells the board each second how far the rank
is, and brings back what the driver or Ray's controller asks for.
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
BITS = {stop: 2 << place for place, stop in enumerate(STOPS)}  # the lower one counts where two are set
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Wants:
    """What a training must do after the step it has made."""

    checkpoint: bool = False
    stop: str = ""
    """Why it must stop, once a checkpoint of this step is written; empty: it continues."""


NOTHING = Wants()


class Writer(Protocol):
    """What stores the checkpoints."""

    @property
    def is_busy(self) -> bool:
        """Whether one is still on its way."""


class Stopped(Exception):  # noqa: N818  (no error: it was asked for)
    """A training stopped because it was asked to, after a checkpoint of its last step was written."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason, step)  # so that it can be pickled
        self.reason, self.step = reason, step

    def __str__(self) -> str:
        return f"the training stopped at step {self.step} ({self.reason})"


class UntilTheEnd:
    """Asks for nothing and tells nobody: checkpoints at the ends of epochs only, to the last one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        """After the training."""

    def begin(self, step: int) -> None:
        """Where the training begins: after how many steps, 0 or those of a checkpoint."""

    def wants(self, step: int, writer: Writer) -> Wants:
        """What all ranks must do now that they have made this step, counted from the beginning of the training.

        It may be asked again about the same step, by all ranks equally often: in a validation.
        """
        return NOTHING

    def give_up(self) -> bool:
        """This rank cannot continue: all of them must stop at a checkpoint of one step (`wants`), after which this one
        says why. Returns whether anything tells them."""
        return False

    def saved(self, step: int) -> None:
        """Rank 0, in any thread: a checkpoint of that step is complete in the store."""

    def fetched(self, items: Iterable[Item]) -> Iterable[Item]:
        """The same items; while one is waited for, the rank waits for data."""
        return items

    def counted(self, work: Callable[..., Result]) -> Callable[..., Result]:
        """The same function; each call of it is a sign of progress."""
        return work

    def busy(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """For something between steps that may take long: validation, writing a checkpoint."""
        return contextlib.nullcontext()


class Union(Protocol):
    """Flags of all ranks together."""

    lag: int
    """After how many further steps they are read."""

    def of(self, flags: int) -> int:
        """Takes this rank's flags of one step; returns those of all ranks, of this step or of one shortly before."""

    def close(self) -> None:
        """Waits for what is under way."""


class OwnFlags:
    """The union of a rank that is alone."""

    lag = 0

    def of(self, flags: int) -> int:
        """See Union."""
        return flags

    def close(self) -> None:
        """See Union."""


class SharedFlags:
    """The union over a gloo group of its own, beside the one that the gradients travel in."""

    def __init__(self, *, lag: int = 1) -> None:
        """Every rank makes one at the same time. `lag` is how many steps pass until flags are read: hosts with GPUs are
        several steps ahead of them, and of each other."""
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
    """One rank's. `with control: ...` around the training."""

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
        """A checkpoint is due `checkpoint_s` or `checkpoint_steps` after the last one; 0: never for that reason.

        `flag` returns why this rank itself wants to stop ("" as long as it does not); it is asked each second.
        """
        self._rank, self._union, self._board, self._clock, self._flag = rank, union, board, clock, flag
        self._checkpoint_s, self._checkpoint_steps = checkpoint_s, checkpoint_steps
        self._step, self._moves = -1, 0
        self._doing, self._slow = "starting", True
        self._flags, self._lock = 0, threading.Lock()
        self._due_since, self._steps_since = clock(), 0
        self._asked_since = 0  # questions of the training since it was last told of a checkpoint
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._over.set()
        if self._board is not None:
            with contextlib.suppress(Exception):
                # The last beat is up to a second old: the steps since would not count as lost.
                self._board.beat.remote(self._rank, self._sign())
                self._board.done.remote(self._rank)
        if kind is None or kind is Stopped:
            # All ranks end at the same step; after an error others may never start theirs.
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
        # Until the answer to a request comes, each question repeats it; the checkpoint it is about is written by then.
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
        self._due_since = self._clock()  # the checkpoint of an epoch counts too
        if self._board is not None:
            with contextlib.suppress(Exception):
                self._board.saved.remote(step)

    def at(self, doing: str, *, slow: bool = False) -> None:
        """The rank gets something done, and is at `doing` now, which may take long without a sign where `slow`."""
        self._doing, self._slow, self._moves = doing, slow, self._moves + 1

    def fetched(self, items: Iterable[Item]) -> Iterator[Item]:
        """See UntilTheEnd."""
        waiting = iter(items)
        while True:
            if self._doing != "starting":  # the first step compiles, and waits for its data too
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
        """By rank 0's clock; the others follow it."""
        if self._rank > 0:
            return False
        by_steps = 0 < self._checkpoint_steps <= self._steps_since + self._union.lag
        return by_steps or 0 < self._checkpoint_s <= self._clock() - self._due_since

    def _beat_on(self) -> None:
        """Tells the board how this rank is; the board may be away for a while."""
        while not self._over.wait(BEAT_S):
            if stop := self._flag():
                self._set(BITS[stop])
            with contextlib.suppress(Exception):
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
