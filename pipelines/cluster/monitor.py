"""The workers of a training and their progress, shared by the ranks, Ray's controller and the driver.

Distinguishes stalled ranks from busy ones, computes the loss when a rank is lost, and passes requests to stop to
the ranks. Does not use Ray.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# Reasons to stop a training after a checkpoint. A rank that cannot continue requests the first and reports why later.
# The group restarts after the last two.
FAILED, INTERRUPTED, TIME_UP, RESIZED, PREEMPTED = "failed", "interrupted", "time", "resize", "preemption"
STOPS = (FAILED, INTERRUPTED, TIME_UP, RESIZED, PREEMPTED)
RESTARTING = (RESIZED, PREEMPTED)
SLOW_S = 900.0  # how long compiling, a store that is down or a large validation may take without progress
TIMES_LONGEST = 5  # on a loaded machine a micro-batch may take this many times the longest so far
STEPS_KEPT = 4096


class Member(NamedTuple):
    """A rank of the current group, and where it runs."""

    rank: int
    node: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on node {self.node})"


class Orders(NamedTuple):
    """Requests to a rank: the reason to stop at a checkpoint, if any."""

    stop: str = ""
    """Why it must stop; empty: it continues."""


class Limits(NamedTuple):
    """How long a rank may make no progress, in seconds."""

    stall_s: float
    """Without a heartbeat, or within a step."""
    slow_s: float = SLOW_S
    """How much longer during work that may take long."""


class Beat(NamedTuple):
    """A heartbeat of one rank. `moves` counts its progress, `doing` says what it is working on."""

    pid: int
    step: int
    """Finished steps of the training; negative until its first step is known."""
    moves: int
    doing: str = ""
    slow: bool = False
    """Whether its work may take much longer than a step (`Limits.slow_s`)."""


class Loss(NamedTuple):
    """The work that a group loses when it ends early: everything since the newest checkpoint."""

    seconds: float = 0.0
    steps: int = 0
    workers: int = 0
    worker_hours: float = 0.0
    """Total worker-hours of the training so far, including the loss."""
    saved_step: int = -1
    """Step of the newest checkpoint; -1 if there is none yet."""


@dataclass
class _Rank:
    beat: Beat
    seen: float
    """Time of the last heartbeat."""
    moved: float
    """Time of its last progress."""
    longest_s: float = 0.0
    """The longest time that work took which is not slow."""


@dataclass
class Monitor:
    """Monitors one training. Times are of this process's monotonic clock, so the clocks of nodes may differ."""

    clock: Callable[[], float] = time.monotonic
    _members: dict[int, Member] = field(default_factory=dict)
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _orders: Orders = field(default_factory=Orders)
    _reached: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    """(step, time when it was first seen), for the current group."""
    _saved: tuple[int, float] | None = None
    """Step of the newest checkpoint, and the time when the group reached it."""
    _worked_s: float = 0.0
    """Worker-seconds of the groups before this one."""

    def count_from(self, worker_hours: float) -> None:
        """Adds the worker-hours that earlier commands spent on this training."""
        self._worked_s = worker_hours * 3600

    def begin_group(self, members: list[Member]) -> None:
        """A new group starts: requests to the previous one are dropped, except to end the run."""
        self._worked_s += self._group_s() * len(self._members)
        self._members = {member.rank: member for member in members}
        # A process that is importing libraries sends no heartbeat yet.
        later = self.clock() + SLOW_S
        self._ranks = {each.rank: _Rank(Beat(each.pid, -1, 0, "starting"), later, later) for each in members}
        self._done.clear()
        self._reached.clear()
        self._orders = Orders(self._orders.stop if self._orders.stop not in RESTARTING else "")

    def beat(self, rank: int, beat: Beat) -> Orders:
        """Records a rank's heartbeat and returns the requests to it; a rank of an earlier group gets none."""
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
        """The rank has ended, successfully or not: no more heartbeats are expected."""
        self._done.add(rank)
        self._ranks.pop(rank, None)

    def ask(self, stop: str) -> bool:
        """Asks the group to stop at a checkpoint; ending the run takes precedence over restarting the group.

        Returns whether a group is training now: one that is about to start has nothing to lose.
        """
        assert stop in STOPS, stop
        if self._orders.stop not in (INTERRUPTED, TIME_UP):
            self._orders = Orders(stop)
        return bool(self._reached)

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is complete."""
        at = next((when for reached, when in self._reached if reached >= step), self.clock())
        if self._saved is None or step >= self._saved[0]:
            self._saved = (step, at)

    def stalled(self, limits: Limits) -> str:
        """Names the ranks that block the group, and for how long; empty while it makes progress.

        A rank without a heartbeat for `limits.stall_s` blocks it. A rank with heartbeats but no progress may be waiting
        for another one, so the group has stalled only if no rank has made progress for as long as its work may take.
        """
        now, limit_s = self.clock(), limits.stall_s
        silent = {rank: now - each.seen for rank, each in self._ranks.items() if now - each.seen >= limit_s}
        if silent:
            return f"{self._named(silent)} sent no heartbeat for {max(silent.values()):.0f} s"
        if not self._ranks or any(now - each.moved < _allowed_s(each, limits) for each in self._ranks.values()):
            return ""
        quiet = {rank: now - each.seen for rank, each in self._ranks.items() if now - each.seen >= limit_s / 2}
        if quiet:  # the others wait for it
            return f"{self._named(quiet)} sent no heartbeat for {max(quiet.values()):.0f} s"
        first = min(each.beat.step for each in self._ranks.values())
        behind = {rank: each for rank, each in self._ranks.items() if each.beat.step == first}
        slow = {rank: each for rank, each in behind.items() if each.beat.slow} or behind
        doing = next(iter(slow.values())).beat.doing or "training"
        since_s = min(now - each.moved for each in slow.values())
        return f"{self._named(slow)} made no progress for {since_s:.0f} s ({doing})"

    def loss(self) -> Loss:
        """The loss if the group ended now."""
        if not self._reached:
            saved = self._saved[0] if self._saved else -1
            return Loss(worker_hours=self._worked_s / 3600, saved_step=saved)
        last, workers = self._reached[-1], max(len(self._members), len(self._ranks))
        first = self._reached[0]
        # A group that resumed from a checkpoint has not lost the steps before it.
        saved, at = self._saved if self._saved and self._saved[0] >= first[0] else first
        worked_s = self._worked_s + (self.clock() - first[1]) * workers
        step = self._saved[0] if self._saved else -1
        return Loss(max(0.0, self.clock() - at), max(0, last[0] - saved), workers, worked_s / 3600, step)

    def _group_s(self) -> float:
        return self._reached[-1][1] - self._reached[0][1] if self._reached else 0.0

    def _named(self, ranks: Mapping[int, object]) -> str:
        return " and ".join(str(self._members.get(rank, f"rank {rank}")) for rank in sorted(ranks))


def _allowed_s(each: _Rank, limits: Limits) -> float:
    """How long, in seconds, the rank may make no progress: the limit, or more if its micro-batches take long."""
    if each.beat.slow:
        return limits.stall_s + limits.slow_s
    return max(limits.stall_s, min(SLOW_S, TIMES_LONGEST * each.longest_s))


def loss_line(loss: Loss, *, gpus: bool) -> str:
    """ "lost 11 s (4 steps) of 2.0 GPU-hours": worker time lost, out of what the training has used so far."""
    unit, steps = "GPU" if gpus else "worker", f"{loss.steps} step{'s' if loss.steps != 1 else ''}"
    used = f"{loss.worker_hours:.1f} {unit}-hours"
    if loss.worker_hours < 0.1:
        used = f"{loss.worker_hours * 3600:.0f} {unit}-seconds"
    lost_s = loss.seconds * loss.workers
    return f"lost {f'{lost_s:.0f} s' if lost_s < 120 else f'{lost_s / 60:.0f} min'} ({steps}) of {used}"
