"""What a training logs to MLflow, kept in order and sent by a thread of its own: the training never waits for MLflow.

Whatever was killed in between, a run gets each point once. What is not sent yet goes into every checkpoint (`unsent`).
A training that resumes hands it back with the history of its epochs (`resume`); of both the thread sends what MLflow
does not have. Importing MLflow takes seconds, and is left to the thread too.
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

GRACE_S = 5.0  # what the rest may take where the training has failed
SETTLE_S = 20.0  # importing MLflow on a busy machine, and the first attempt that shows that it is away


@dataclass(frozen=True)
class Entry:
    """One thing to log: an epoch with its `metrics`, or `tags`. Its fields are plain JSON."""

    at_ms: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    step_losses: Sequence[float] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    is_history: bool = False
    """Whether a checkpoint holds it anyway, in its history."""


class Outbox(Journal):
    """The entries of one run of MLflow.

    Args:
        tracking: Where to, and with how much patience.
        run_id: The run, or what finds or makes it; the thread calls that with the first entry.
        begin: Hears what `close` waits for.

    Whatever a call of MLflow's ended with that another attempt cannot help is raised by the next call here.
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
        with contextlib.suppress(Exception):  # what ended the training is what must be reported
            self.close(within_s=GRACE_S)

    def epoch(self, metrics: Mapping[str, float], step_losses: Sequence[float]) -> None:
        """Logs one epoch (see `Tracking.log_epoch`)."""
        self._put(Entry(_now_ms(), metrics=dict(metrics), step_losses=list(step_losses)))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        self._put(Entry(_now_ms(), tags=dict(tags)))

    def resume(self, history: Iterable[Mapping[str, float]], unsent: Iterable[Mapping[str, Any]] = ()) -> None:
        """Before the first epoch of a training that resumes: logs what is missing of the epochs before.

        `history` holds the metrics of every finished epoch, `unsent` what `unsent` returned for the checkpoint. Only
        the first call counts: a trial calls it before the loop does.
        """
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
        """What is not known to be in MLflow, as JSON, for a checkpoint."""
        with self._changed:
            return [asdict(entry) for entry in self._entries if not entry.is_history]

    def check(self) -> None:
        """Raises what MLflow refused, and PatienceError once it was away for too long."""
        if self._error is not None:
            raise self._error

    def settle(self, within_s: float = SETTLE_S) -> None:
        """Waits until everything is sent, unless MLflow is away: for a process that may end soon without a word."""
        until = time.monotonic() + within_s
        while self._entries and not self._tracking.is_away and self._error is None and time.monotonic() < until:
            time.sleep(0.02)

    def close(self, *, within_s: float | None = None) -> None:
        """Waits until everything is sent, for as long as the tracking is patient, or for `within_s`."""
        with self._changed:
            self._is_ending, left = True, len(self._entries)
            self._changed.notify_all()
        if self._thread is not None:
            if within_s is None and left:
                self._thread.join(1.0)
                if self._thread.is_alive():
                    self._begin("sending to MLflow what was logged")
            self._thread.join(within_s)
        self.check()

    def _put(self, entry: Entry) -> None:
        with self._changed:
            self._entries.append(entry)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="outbox", daemon=True)
                self._thread.start()
        self.check()  # the entry is kept for the next checkpoint all the same

    def _send_all(self) -> None:
        try:
            run: _Run | None = None
            while (entry := self._first()) is not None:
                run = run or self._open_run()
                run.send(entry)
                with self._changed:
                    self._entries.popleft()
        except BaseException as error:
            self._error = error

    def _first(self) -> Entry | None:
        """The oldest entry, waited for; None where none will come any more."""
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
        return f"what was logged of {counted(epochs, 'epoch')} is being sent"


class _Run:
    """A run of MLflow, and up to where it has what a training logs: its points come in order, from one writer."""

    def __init__(self, tracking: Tracking, run_id: str, kept: Callable[[], str]) -> None:
        self._tracking, self._id, self._kept = tracking, run_id, kept
        self._epoch, self._step = self._last("train_loss"), self._last("step_loss")

    def send(self, entry: Entry) -> None:
        """Logs what the run lacks of an entry."""
        self._tracking.patiently(lambda: self._log(entry), kept=self._kept)
        if entry.step_losses:
            self._step = max(self._step, int(entry.metrics["step"]))
        if entry.metrics:
            self._epoch = max(self._epoch, int(entry.metrics["epoch"]))

    def _log(self, entry: Entry) -> None:
        once = self._tracking.impatient
        if entry.tags:
            once.set_tags(self._id, entry.tags)
        # One that was logged before its checkpoint was lost is trained again, to the same numbers.
        if entry.metrics and int(entry.metrics["epoch"]) > self._epoch:
            once.log_epoch(self._id, entry.metrics, entry.step_losses, at_ms=entry.at_ms, after_step=self._step)

    def _last(self, name: str) -> int:
        once = self._tracking.impatient
        return max(self._tracking.patiently(lambda: once.read_steps(self._id, name), kept=self._kept), default=0)


def _now_ms() -> int:
    return int(time.time() * 1000)
