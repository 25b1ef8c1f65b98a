"""How the driver of a training ends it in order: Ctrl-C, SIGTERM and the end of its time lead to a checkpoint first."""

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

CHECKPOINT_WAIT_S = 60.0  # for the checkpoint of an interrupted training
ANSWER_S = 5.0
ASK_EVERY_S = 1.0
POLL_S = 0.2


class Paused(SystemExit):
    """The command ends before its work is done, as it was asked to: no failure. Its text is for the user."""

    def __init__(self, text: str) -> None:
        super().__init__(0)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Stops:
    """Hands on the first signal, and the end of the time, to the training of `board`."""

    def __init__(self, board: Any, say: Callable[[str], None], *, until: float = 0.0) -> None:
        """`until` is when the time is up, on this process's monotonic clock; 0: never."""
        self._board, self._say, self._until = board, say, until
        self._signal = 0
        self._told = self._over = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """While the block lasts, the first SIGTERM or Ctrl-C asks for a checkpoint; a second one ends at once."""
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
        """Ends this process where the training stopped before its end, as `stopped` ("reason", "step") says."""
        if not stopped:
            if self._signal:
                self._say("interrupted: the training had come to its end")
                raise SystemExit(128 + self._signal)
            return
        step = f"a checkpoint of step {stopped['step']} was written, 0 steps are lost"
        if stopped["reason"] == TIME_UP:
            raise Paused(f"the time of --max-minutes is up: {step}; {RESUME}")
        self._say(f"interrupted: {step}")
        raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def _take(self, number: int, frame: object) -> None:
        if self._signal:
            raise SystemExit(128 + number)
        self._signal = number  # the thread does the rest: nothing here may wait

    def _watch(self) -> None:
        while not self._over:
            time.sleep(POLL_S)
            if self._signal:
                self._interrupt()
                return
            if self._until and time.monotonic() >= self._until:
                if not self._told:
                    self._told = True
                    self._say("the time is up: the training ends at its next checkpoint")
                self._ask(TIME_UP)  # again and again: the board may have been restarted, and forgets what was asked
                time.sleep(ASK_EVERY_S)

    def _interrupt(self) -> None:
        """Asks for a checkpoint, and ends this process where none comes of it."""
        asked_at = time.monotonic()
        is_told = False
        while not self._over:
            # Nothing is trained yet, or Ray has got the signal too.
            if self._ask(INTERRUPTED) is False:
                break
            if not is_told:
                self._say("interrupted: writing a checkpoint; interrupt again to end at once")
                is_told = True
            time.sleep(ASK_EVERY_S)
            if time.monotonic() - asked_at > CHECKPOINT_WAIT_S:
                self._say(f"no checkpoint within {CHECKPOINT_WAIT_S:.0f} s: what came after the last one is lost")
                break
        if not self._over:
            os.kill(os.getpid(), self._signal)

    def _ask(self, stop: str) -> bool | None:
        """Whether a group trains, and so will write a checkpoint; None where the board did not answer in time."""
        import ray

        try:
            return ray.get(self._board.ask.remote(stop), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            return None
        except Exception:  # Ray is gone
            return False
