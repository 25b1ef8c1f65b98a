"""Whether this process was told to end, which is known at once, also while its main thread is in native code."""

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
# Set once the last line of the command is on the terminal: nobody else has to say what happened.
HAS_TOLD = threading.Event()
_asked = threading.Event()
_ends: list[int] = []  # of the pipe that Python's C handler writes the number of each signal to


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While the block lasts SIGTERM ends the process as Ctrl-C does, so that what it holds is given back.

    An error that the block ends with after that counts as the interruption: a signal to the whole process group ends
    Ray and its workers too, and what they leave unfinished fails in many ways.
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
    is_interrupted()  # reads away what belongs to an earlier block
    _asked.clear()
    HAS_TOLD.clear()
    before = signal.signal(signal.SIGTERM, end)
    woken = signal.set_wakeup_fd(_ends[1], warn_on_full_buffer=False)
    try:
        yield
    except Exception as error:
        raise_if_interrupted(error)
        raise
    finally:
        is_interrupted()
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)


def is_interrupted(*, wait_s: float = 0.0) -> bool:
    """Whether SIGTERM or Ctrl-C has come since the block `interruptible` began; waits for it up to `wait_s`."""
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
    """Raises the SystemExit that SIGTERM stands for, if the process was told to end; `error` came of that.

    A lost lease interrupts too (see `driver_lease`), and says so itself.
    """
    if is_interrupted() and not isinstance(error, LostLeaseError):
        raise SystemExit(128 + signal.SIGTERM) from error


def _forget() -> None:
    # A pool ends its processes by SIGTERM, which is no signal to this one.
    signal.set_wakeup_fd(-1)
