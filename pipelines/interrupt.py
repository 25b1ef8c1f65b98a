"""Notices SIGTERM and Ctrl-C at once, even while the main thread is in native code."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from data_shards.store.fenced_lease import LostLeaseError
from pipelines.faults import RESUME

INTERRUPTED = f"interrupted; {RESUME}"
ENDING = (signal.SIGTERM, signal.SIGINT)
# Set once the command has printed its last line: no other thread has to report what happened.
HAS_REPORTED = threading.Event()
_asked = threading.Event()
_ends: list[int] = []  # the pipe that Python's C handler writes signal numbers to


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block SIGTERM ends the process as Ctrl-C does, so that it releases what it holds.

    An error after a signal counts as the interruption: a signal to the process group also ends Ray and its workers,
    and the work that they leave fails in many ways.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if not _ends:
        _ends.extend(os.pipe())
        for each in _ends:
            os.set_blocking(each, False)
        os.register_at_fork(after_in_child=_forget)
    is_interrupted()  # drains the signals of an earlier block
    _asked.clear()
    HAS_REPORTED.clear()
    before = signal.signal(signal.SIGTERM, end)
    woken = signal.set_wakeup_fd(_ends[1], warn_on_full_buffer=False)
    try:
        yield
    except Exception as error:  # any error may follow from the signal
        raise_if_interrupted(error)
        raise
    finally:
        is_interrupted()
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)


def is_interrupted(*, wait_s: float = 0.0) -> bool:
    """Whether SIGTERM or Ctrl-C has arrived since `interruptible` began; waits up to `wait_s` seconds for it."""
    if not _ends:
        return False
    for _ in range(1 + round(wait_s / 0.1)):
        with contextlib.suppress(BlockingIOError):
            if set(os.read(_ends[0], 4096)) & set(ENDING):
                _asked.set()
        if _asked.wait(0.1 if wait_s else 0.0):
            return True
    return False


def raise_if_interrupted(error: Exception) -> None:
    """Raises SystemExit, as for SIGTERM, from `error` if the process was interrupted.

    A lost lease also interrupts (see `driver_lease`), but keeps its own message.
    """
    if is_interrupted() and not isinstance(error, LostLeaseError):
        raise SystemExit(128 + signal.SIGTERM) from error


def _forget() -> None:
    # A pool ends its forked workers with SIGTERM; they must not write it to this process's pipe.
    signal.set_wakeup_fd(-1)
