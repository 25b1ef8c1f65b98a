"""Services that are away: since when, for how long they are waited for, and who hears of it.

One state for each service and process, whatever number of operations wait for it: an outage begins with the first
attempt that fails, ends with the first that is answered, and is reported once when it has lasted for NOTICE_S and once
when it is over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PATIENCE_S = 900.0  # how long a service that is away is waited for, unless the user says otherwise
NOTICE_S = 10.0  # a shorter outage is not worth a line
_FORGOTTEN_S = 60.0  # a service that nobody has asked for so long may have been there meanwhile
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """What a listener hears: a service is away, or it is back. Its fields are plain, so that it can be sent as JSON."""

    who: str
    since: float
    """Seconds since 1970."""
    patience_s: float
    meanwhile: str = ""
    """What the work does without the service."""
    over_after_s: float = 0.0
    """How long the outage lasted; 0 while it does."""
    sent: str = ""
    """What was kept during the outage and has been sent since."""

    def __str__(self) -> str:
        if self.over_after_s:
            return f"{self.who} answers again after {span(self.over_after_s)}" + (f": {self.sent}" if self.sent else "")
        began = time.strftime("%H:%M:%S", time.localtime(self.since))
        return (
            f"{self.who} has not answered since {began}: {self.meanwhile or 'what needs it waits'}, for at most "
            f"{span(self.patience_s)}"
        )


Hear = Callable[[Notice], None]


class Outage:
    """Whether one service is away. Threads share it."""

    def __init__(self, who: str, meanwhile: str = "") -> None:
        self._who, self._meanwhile = who, meanwhile
        self._lock = threading.Lock()
        self._began = self._last = 0.0  # of the attempts that failed; 0: it is there
        self._since = 0.0
        self._is_told = False

    def failed(self, patience_s: float) -> float:
        """An attempt was not answered: returns for how many seconds the service has been away."""
        notice = None
        with self._lock:
            now = time.monotonic()
            if not self._began or now - self._last > _FORGOTTEN_S:
                self._began, self._since, self._is_told = now, time.time(), False
            self._last = now
            away_s = now - self._began
            if away_s >= NOTICE_S and patience_s > NOTICE_S and not self._is_told:
                self._is_told = True
                notice = Notice(self._who, self._since, patience_s, self._meanwhile)
        if notice:
            _tell(notice)
        return away_s

    def answered(self, sent: str = "") -> None:
        """An attempt was answered, with whatever: the service is there. `sent` says what of the kept was sent."""
        if not self._began:
            return
        with self._lock:
            away_s, was_told = self._last - self._began, self._is_told
            notice = Notice(self._who, self._since, 0.0, self._meanwhile, max(1.0, away_s), sent)
            self._began, self._is_told = 0.0, False
        if was_told:
            _tell(notice)

    @property
    def away_s(self) -> float:
        """Seconds since the first attempt that failed; 0 where the service is there."""
        with self._lock:
            return time.monotonic() - self._began if self._began else 0.0


def outage_of(who: str, meanwhile: str = "") -> Outage:
    """This process's state of a service."""
    return _outages.setdefault(who, Outage(who, meanwhile))


@contextlib.contextmanager
def listening(hear: Hear) -> Iterator[None]:
    """Gives `hear` what this process finds out about outages while the block lasts; it is called from any thread.

    Without a listener they are warnings in the log.
    """
    _listeners.append(hear)
    try:
        yield
    finally:
        _listeners.remove(hear)


def span(seconds: float) -> str:
    """Seconds as a user reads them: "45 s", "15 minutes", "1:30 minutes"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if rest:
        return f"{minutes}:{rest:02} minutes"
    return f"{minutes} minute{'s' if minutes > 1 else ''}"


def _tell(notice: Notice) -> None:
    for hear in list(_listeners[-1:]) or [_warn]:
        hear(notice)


def _warn(notice: Notice) -> None:
    _log.warning("%s", notice)


_outages: dict[str, Outage] = {}
_listeners: list[Hear] = []


def _forget_in_child() -> None:
    # Their locks may be held by threads that a forked process does not have.
    _outages.clear()
    _listeners.clear()


os.register_at_fork(after_in_child=_forget_in_child)
