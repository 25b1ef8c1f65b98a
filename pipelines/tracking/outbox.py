"""Queues what a training logs to MLflow and sends it from a separate thread, so that training never waits for MLflow.

A run gets each point exactly once, even across kills: unsent entries are stored in every checkpoint (`unsent`), and a
resumed training passes them back with the history of its epochs (`resume`). The thread then sends what MLflow lacks.
It also imports MLflow, which takes seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.tracking.runs import Tracking
from pipelines.wording import counted
from pipelines.worker.journal import Journal

GRACE_S = 5.0  # how long a failed training waits for the remaining entries
SETTLE_S = 20.0  # enough to import MLflow on a busy machine and to notice that it is unavailable


@dataclass(frozen=True)
class Entry:
    """One entry to log: an epoch with its `metrics`, or `tags`. Its fields are plain JSON."""

    at_ms: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    step_losses: Sequence[float] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    is_history: bool = False
    """Whether a checkpoint already has it in its history."""


class Outbox(Journal):
    """The queue of entries for one MLflow run.

    A permanent error of the sending thread is raised by the next call of a method here.

    Args:
        tracking: The MLflow to log to, and its patience.
        run_id: The run's id, or a function that finds or creates it; the thread calls it at the first entry.
        begin: Called with a description of what `close` waits for.
    """

    def __init__(
        self, tracking: Tracking, run_id: str | Callable[[], str], *, begin: Callable[[str], None] = lambda what: None
    ) -> None:
        self._tracking, self._find, self._begin = tracking, run_id, begin
        self._entries: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._is_ending = self._is_resumed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # broad: the error that ended the training must be reported
            self.close(within_s=GRACE_S)

    def epoch(self, metrics: Mapping[str, float], step_losses: Sequence[float]) -> None:
        """Logs one epoch (see `Tracking.log_epoch`)."""
        self._put(Entry(_now_ms(), metrics=dict(metrics), step_losses=list(step_losses)))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        self._put(Entry(_now_ms(), tags=dict(tags)))

    def resume(self, history: Iterable[Mapping[str, float]], unsent: Iterable[Mapping[str, Any]] = ()) -> None:
        """See Journal. Only the first call has an effect, because a trial calls it before the loop does."""
        if self._is_resumed:
            return
        self._is_resumed = True
        kept = [Entry(**entry) for entry in unsent]
        epochs = {int(entry.metrics["epoch"]) for entry in kept if entry.metrics}
        past = [Entry(_now_ms(), metrics=dict(each), is_history=True) for each in history]
        missing = [entry for entry in past if int(entry.metrics["epoch"]) not in epochs]
        for entry in sorted([*missing, *kept], key=lambda each: each.metrics.get("epoch", float("inf"))):
            self._put(entry)

    def unsent(self) -> list[dict[str, Any]]:
        """See Journal."""
        with self._changed:
            return [asdict(entry) for entry in self._entries if not entry.is_history]

    def check(self) -> None:
        """Raises TrackingError if MLflow rejected an entry, PatienceError if it was unavailable for too long."""
        if self._error is not None:
            raise self._error

    def settle(self, within_s: float = SETTLE_S) -> None:
        """Waits until everything is sent, unless MLflow is unavailable. For a process that may be killed soon."""
        until = time.monotonic() + within_s
        while self._entries and not self._tracking.is_away and self._error is None and time.monotonic() < until:
            time.sleep(0.02)

    def close(self, *, within_s: float | None = None) -> None:
        """Waits until everything is sent, limited by the tracking's patience or by `within_s`."""
        with self._changed:
            self._is_ending, left = True, len(self._entries)
            self._changed.notify_all()
        if self._thread is not None:
            if within_s is None and left:
                self._thread.join(1.0)
                if self._thread.is_alive():
                    self._begin("sending log entries to MLflow")
            self._thread.join(within_s)
        self.check()

    def _put(self, entry: Entry) -> None:
        with self._changed:
            self._entries.append(entry)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="outbox", daemon=True)
                self._thread.start()
        self.check()  # last, so that the entry is kept for the next checkpoint

    def _send_all(self) -> None:
        try:
            run: _Run | None = None
            while (entry := self._first()) is not None:
                run = run or self._open_run()
                run.send(entry)
                with self._changed:
                    self._entries.popleft()
        except BaseException as error:  # broad: the training thread raises it from its next call
            self._error = error

    def _first(self) -> Entry | None:
        """Waits for the oldest entry and returns it; None once the outbox is closed and empty."""
        with self._changed:
            while not self._entries and not self._is_ending:
                self._changed.wait()
            return self._entries[0] if self._entries else None

    def _open_run(self) -> _Run:
        find = self._find
        run_id = find if isinstance(find, str) else self._tracking.patiently(find, kept=self._kept)
        return _Run(self._tracking, run_id, self._kept)

    def _kept(self) -> str:
        epochs = sum(bool(entry.metrics) for entry in list(self._entries))
        if not epochs:
            return ""
        return f"sending the log entries of {counted(epochs, 'epoch')}"


class _Run:
    """An MLflow run and the last epoch and step that it has; points arrive in order from one writer."""

    def __init__(self, tracking: Tracking, run_id: str, kept: Callable[[], str]) -> None:
        self._tracking, self._id, self._kept = tracking, run_id, kept
        self._epoch, self._step = self._last("train_loss"), self._last("step_loss")

    def send(self, entry: Entry) -> None:
        """Logs the part of an entry that the run lacks."""
        self._tracking.patiently(lambda: self._log(entry), kept=self._kept)
        if entry.step_losses:
            self._step = max(self._step, int(entry.metrics["step"]))
        if entry.metrics:
            self._epoch = max(self._epoch, int(entry.metrics["epoch"]))

    def _log(self, entry: Entry) -> None:
        once = self._tracking.impatient
        if entry.tags:
            once.set_tags(self._id, entry.tags)
        # If a checkpoint was lost after logging, the epoch is trained again with the same numbers.
        if entry.metrics and int(entry.metrics["epoch"]) > self._epoch:
            once.log_epoch(self._id, entry.metrics, entry.step_losses, at_ms=entry.at_ms, after_step=self._step)

    def _last(self, name: str) -> int:
        once = self._tracking.impatient
        return max(self._tracking.patiently(lambda: once.read_steps(self._id, name), kept=self._kept), default=0)


def _now_ms() -> int:
    return int(time.time() * 1000)
