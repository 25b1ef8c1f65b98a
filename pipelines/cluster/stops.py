"""Stops a training in order: after Ctrl-C, SIGTERM or the end of its time it writes a checkpoint first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.cluster.monitor import INTERRUPTED, TIME_UP
from pipelines.group_faults import RESUME

CHECKPOINT_WAIT_S = 60.0  # limit for the checkpoint of an interrupted training
ANSWER_S = 5.0
ASK_EVERY_S = 1.0
POLL_S = 0.2


class Paused(SystemExit):
    """The command ends early because it was asked to, which is not a failure. The text is for the user."""

    def __init__(self, text: str) -> None:
        super().__init__(0)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Stops:
    """Passes the first signal, and the end of the time, on to the training of `board`."""

    def __init__(self, board: Any, say: Callable[[str], None], *, until: float = 0.0) -> None:
        """`until` is when the time is up, in seconds of this process's monotonic clock; 0: never."""
        self._board, self._say, self._until = board, say, until
        self._signal = 0
        self._is_reported = self._over = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """During the block, the first SIGTERM or Ctrl-C requests a checkpoint; a second ends the process at once."""
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
        for number in before:
            signal.signal(number, self._take)
        self._thread.start()
        try:
            yield
        finally:
            self._over = True
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_if_ended(self, stopped: dict[str, Any] | None) -> None:
        """Ends this process if the training stopped early, as `stopped` ("reason", "step") says."""
        if not stopped:
            if self._signal:
                self._say("interrupted, but the training had already finished")
                raise SystemExit(128 + self._signal)
            return
        step = f"a checkpoint of step {stopped['step']} was written, no steps are lost"
        if stopped["reason"] == TIME_UP:
            raise Paused(f"the time of --max-minutes is up: {step}; {RESUME}")
        self._say(f"interrupted: {step}")
        raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def _take(self, number: int, frame: object) -> None:
        if self._signal:
            raise SystemExit(128 + number)
        self._signal = number  # the thread does the rest; a signal handler must not wait

    def _watch(self) -> None:
        while not self._over:
            time.sleep(POLL_S)
            if self._signal:
                self._interrupt()
                return
            if self._until and time.monotonic() >= self._until:
                if not self._is_reported:
                    self._is_reported = True
                    self._say("the time is up: the training stops at its next checkpoint")
                self._ask(TIME_UP)  # repeatedly: a restarted board has forgotten the request
                time.sleep(ASK_EVERY_S)

    def _interrupt(self) -> None:
        """Requests a checkpoint, and ends this process if none is written."""
        asked_at = time.monotonic()
        is_reported = False
        while not self._over:
            # No training yet, or Ray has received the signal too.
            if self._ask(INTERRUPTED) is False:
                break
            if not is_reported:
                self._say("interrupted: writing a checkpoint; interrupt again to end at once")
                is_reported = True
            time.sleep(ASK_EVERY_S)
            if time.monotonic() - asked_at > CHECKPOINT_WAIT_S:
                self._say(f"no checkpoint within {CHECKPOINT_WAIT_S:.0f} s: the steps after the last one are lost")
                break
        if not self._over:
            os.kill(os.getpid(), self._signal)

    def _ask(self, stop: str) -> bool | None:
        """Whether a group is training and will write a checkpoint; None if the board did not answer in time."""
        import ray

        try:
            return ray.get(self._board.ask.remote(stop), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            return None
        except Exception:  # any error means that Ray is gone
            return False
