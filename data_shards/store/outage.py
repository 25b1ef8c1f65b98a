"""Outages of services: their start, the waiting time and notices about them.

Each process has one state per service, shared by all waiting operations: an outage begins with the first failed
attempt, ends with the first answer, and is reported once after NOTICE_S and once when it is over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PATIENCE_S = 900.0  # default waiting time for an unreachable service
NOTICE_S = 10.0  # shorter outages are not reported
_FORGOTTEN_S = 60.0  # after so long without attempts the service may have been back meanwhile
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """Notice that a service is unreachable or back. The fields are plain, so that it can be sent as JSON."""

    who: str
    since: float
    """Seconds since 1970."""
    patience_s: float
    meanwhile: str = ""
    """What happens to the work meanwhile."""
    over_after_s: float = 0.0
    """Duration of the outage; 0 while it lasts."""
    sent: str = ""
    """What was buffered during the outage and sent afterwards."""

    def __str__(self) -> str:
        if self.over_after_s:
            return f"{self.who} answers again after {span(self.over_after_s)}" + (f": {self.sent}" if self.sent else "")
        began = time.strftime("%H:%M:%S", time.localtime(self.since))
        return (
            f"{self.who} has not answered since {began}: {self.meanwhile or 'work that needs it waits'}, for at most "
            f"{span(self.patience_s)}"
        )


Hear = Callable[[Notice], None]


class Outage:
    """The outage state of one service. Thread-safe."""

    def __init__(self, who: str, meanwhile: str = "") -> None:
        self._who, self._meanwhile = who, meanwhile
        self._lock = threading.Lock()
        self._began = self._last = 0.0  # first and last failed attempt; 0: reachable
        self._since = 0.0
        self._is_reported = False

    def failed(self, patience_s: float) -> float:
        """Records an attempt without an answer; returns the duration of the outage in seconds."""
        notice = None
        with self._lock:
            now = time.monotonic()
            if not self._began or now - self._last > _FORGOTTEN_S:
                self._began, self._since, self._is_reported = now, time.time(), False
            self._last = now
            away_s = now - self._began
            if away_s >= NOTICE_S and patience_s > NOTICE_S and not self._is_reported:
                self._is_reported = True
                notice = Notice(self._who, self._since, patience_s, self._meanwhile)
        if notice:
            _notify(notice)
        return away_s

    def answered(self, sent: str = "") -> None:
        """Records an answer, even a refusal: the service is reachable. `sent` describes buffered work that was sent."""
        if not self._began:
            return
        with self._lock:
            away_s, was_reported = self._last - self._began, self._is_reported
            notice = Notice(self._who, self._since, 0.0, self._meanwhile, max(1.0, away_s), sent)
            self._began, self._is_reported = 0.0, False
        if was_reported:
            _notify(notice)

    @property
    def away_s(self) -> float:
        """Seconds since the first failed attempt; 0 if the service is reachable."""
        with self._lock:
            return time.monotonic() - self._began if self._began else 0.0


def outage_of(who: str, meanwhile: str = "") -> Outage:
    """The outage state of a service in this process."""
    return _outages.setdefault(who, Outage(who, meanwhile))


@contextlib.contextmanager
def listening(hear: Hear) -> Iterator[None]:
    """Calls `hear` with notices of this process while the block lasts, from any thread.

    Without a listener, notices are logged as warnings.
    """
    _listeners.append(hear)
    try:
        yield
    finally:
        _listeners.remove(hear)


def span(seconds: float) -> str:
    """Seconds as text: "45 s", "15 minutes", "1:30 minutes"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if rest:
        return f"{minutes}:{rest:02} minutes"
    return f"{minutes} minute{'s' if minutes > 1 else ''}"


def _notify(notice: Notice) -> None:
    for hear in list(_listeners[-1:]) or [_warn]:
        hear(notice)


def _warn(notice: Notice) -> None:
    _log.warning("%s", notice)


_outages: dict[str, Outage] = {}
_listeners: list[Hear] = []


def _forget_in_child() -> None:
    # Locks may be held by threads that do not exist in the forked process.
    _outages.clear()
    _listeners.clear()


os.register_at_fork(after_in_child=_forget_in_child)
