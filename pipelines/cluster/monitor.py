"""Who works on a training and how far each rank is: what ranks, Ray's controller and the driver know together.

It distinguishes a stalled rank from a busy one, counts what a lost rank costs, and hands on what the ranks are
asked for (a checkpoint, an end). It knows no Ray.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# Why a training is asked to stop, once it has written a checkpoint. A rank that cannot continue asks for the first, and
# says why afterwards. The group starts again after the last two.
FAILED, INTERRUPTED, TIME_UP, RESIZED, PREEMPTED = "failed", "interrupted", "time", "resize", "preemption"
STOPS = (FAILED, INTERRUPTED, TIME_UP, RESIZED, PREEMPTED)
RESTARTING = (RESIZED, PREEMPTED)
SLOW_S = 900.0  # what compiling, a store that is away, or a large validation may take without a sign of progress
TIMES_LONGEST = 5  # a micro-batch on a loaded machine may take so many times as long as the longest so far
STEPS_KEPT = 4096


class Member(NamedTuple):
    """A rank of the group that works now: where it runs."""

    rank: int
    node: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on node {self.node})"


class Orders(NamedTuple):
    """What a rank is asked to do."""

    stop: str = ""
    """Why it must stop; empty: it continues."""


class Limits(NamedTuple):
    """How long a rank may stand still."""

    stall_s: float
    """Without a sign of life, or in the middle of a step."""
    slow_s: float = SLOW_S
    """How much longer at something that may take long."""


class Beat(NamedTuple):
    """A sign of life of one rank. `moves` counts what it gets done, `doing` says what it is at."""

    pid: int
    step: int
    """Steps of the training that are made; negative as long as it is not known from where it begins."""
    moves: int
    doing: str = ""
    slow: bool = False
    """Whether what it does may take much longer than a step (`Limits.slow_s`)."""


class Loss(NamedTuple):
    """What a group that ended early has lost: everything since the newest checkpoint."""

    seconds: float = 0.0
    steps: int = 0
    workers: int = 0
    worker_hours: float = 0.0
    """What has been worked on the training so far, the loss included."""
    saved_step: int = -1
    """Of the newest checkpoint; -1 where there is none yet."""


@dataclass
class _Rank:
    beat: Beat
    seen: float
    """When the last beat came."""
    moved: float
    """When it last got something done."""
    longest_s: float = 0.0
    """The longest that it took for something that is not slow."""


@dataclass
class Monitor:
    """One training's. Times are this process's monotonic clock, so clocks of nodes may differ."""

    clock: Callable[[], float] = time.monotonic
    _members: dict[int, Member] = field(default_factory=dict)
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _orders: Orders = field(default_factory=Orders)
    _reached: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    """Step -> when it was first seen, of the group that works now."""
    _saved: tuple[int, float] | None = None
    """Step of the newest checkpoint, and when the group had reached it."""
    _worked_s: float = 0.0
    """Worker-seconds of the groups before this one."""

    def count_from(self, worker_hours: float) -> None:
        """What earlier commands have worked on this training."""
        self._worked_s = worker_hours * 3600

    def begin_group(self, members: list[Member]) -> None:
        """Another group begins to work: what was asked of the one before is done with, but for an end of the run."""
        self._worked_s += self._group_s() * len(self._members)
        self._members = {member.rank: member for member in members}
        # A process that imports its libraries gives no sign of life yet.
        later = self.clock() + SLOW_S
        self._ranks = {each.rank: _Rank(Beat(each.pid, -1, 0, "starting"), later, later) for each in members}
        self._done.clear()
        self._reached.clear()
        self._orders = Orders(self._orders.stop if self._orders.stop not in RESTARTING else "")

    def beat(self, rank: int, beat: Beat) -> Orders:
        """Takes a rank's sign of life; returns what it is asked for. One of an earlier group gets no orders."""
        member = self._members.get(rank)
        if member is not None and member.pid != beat.pid:
            return Orders()
        if rank in self._done:
            return self._orders
        now, known = self.clock(), self._ranks.get(rank)
        if known is None or known.beat[1:] != beat[1:]:
            took_s = now - known.moved if known and not known.beat.slow else 0.0
            self._ranks[rank] = _Rank(beat, now, now, max(took_s, known.longest_s if known else 0.0))
        else:
            known.seen = now
        if beat.step >= 0 and (not self._reached or beat.step > self._reached[-1][0]):
            self._reached.append((beat.step, now))
        return self._orders

    def done(self, rank: int) -> None:
        """The rank has ended its work, well or not: nothing more is expected of it."""
        self._done.add(rank)
        self._ranks.pop(rank, None)

    def ask(self, stop: str) -> bool:
        """Asks the group to stop at a checkpoint; an end of the run counts before a restart of the group.

        Returns whether a group trains now: one that is about to begin has nothing to lose.
        """
        assert stop in STOPS, stop
        if self._orders.stop not in (INTERRUPTED, TIME_UP):
            self._orders = self._orders._replace(stop=stop)
        return bool(self._reached)

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is whole."""
        at = next((when for reached, when in self._reached if reached >= step), self.clock())
        if self._saved is None or step >= self._saved[0]:
            self._saved = (step, at)

    def stalled(self, limits: Limits) -> str:
        """Names the ranks that hold up the group, and since when; empty while it works.

        A rank that is silent for `limits.stall_s` holds it up. One that gives signs of life and gets nothing done may
        wait for another, so the group has stalled only where all ranks have got nothing done for as long as what they
        are at may take.
        """
        now, limit_s = self.clock(), limits.stall_s
        silent = {rank: now - each.seen for rank, each in self._ranks.items() if now - each.seen >= limit_s}
        if silent:
            return f"{self._named(silent)} gave no sign of life for {max(silent.values()):.0f} s"
        if not self._ranks or any(now - each.moved < _allowed_s(each, limits) for each in self._ranks.values()):
            return ""
        quiet = {rank: now - each.seen for rank, each in self._ranks.items() if now - each.seen >= limit_s / 2}
        if quiet:  # the others wait for it
            return f"{self._named(quiet)} gave no sign of life for {max(quiet.values()):.0f} s"
        first = min(each.beat.step for each in self._ranks.values())
        behind = {rank: each for rank, each in self._ranks.items() if each.beat.step == first}
        slow = {rank: each for rank, each in behind.items() if each.beat.slow} or behind
        doing = next(iter(slow.values())).beat.doing or "training"
        since_s = min(now - each.moved for each in slow.values())
        return f"{self._named(slow)} made no progress for {since_s:.0f} s ({doing})"

    def loss(self) -> Loss:
        """What is lost if the group ends now."""
        if not self._reached:
            saved = self._saved[0] if self._saved else -1
            return Loss(worker_hours=self._worked_s / 3600, saved_step=saved)
        last, workers = self._reached[-1], max(len(self._members), len(self._ranks))
        first = self._reached[0]
        # A group that began from a checkpoint has lost nothing of what was before that.
        saved, at = self._saved if self._saved and self._saved[0] >= first[0] else first
        worked_s = self._worked_s + (self.clock() - first[1]) * workers
        step = self._saved[0] if self._saved else -1
        return Loss(max(0.0, self.clock() - at), max(0, last[0] - saved), workers, worked_s / 3600, step)

    def _group_s(self) -> float:
        return self._reached[-1][1] - self._reached[0][1] if self._reached else 0.0

    def _named(self, ranks: Mapping[int, object]) -> str:
        return " and ".join(str(self._members.get(rank, f"rank {rank}")) for rank in sorted(ranks))


def _allowed_s(each: _Rank, limits: Limits) -> float:
    """How long the rank may get nothing done: the limit, or more where its own micro-batches take long."""
    if each.beat.slow:
        return limits.stall_s + limits.slow_s
    return max(limits.stall_s, min(SLOW_S, TIMES_LONGEST * each.longest_s))


def loss_line(loss: Loss, *, gpus: bool) -> str:
    """ "lost 11 s (4 steps) of 2.0 GPU-hours": the time of all workers, of what the training has used so far."""
    unit, steps = "GPU" if gpus else "worker", f"{loss.steps} step{'s' if loss.steps != 1 else ''}"
    used = f"{loss.worker_hours:.1f} {unit}-hours"
    if loss.worker_hours < 0.1:
        used = f"{loss.worker_hours * 3600:.0f} {unit}-seconds"
    lost_s = loss.seconds * loss.workers
    return f"lost {f'{lost_s:.0f} s' if lost_s < 120 else f'{lost_s / 60:.0f} min'} ({steps}) of {used}"
