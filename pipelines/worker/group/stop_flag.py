"""Why one worker itself wants to stop: its process was told to end, or its node will be taken away."""

from __future__ import annotations

import contextlib
import signal

from pipelines.cluster.monitor import INTERRUPTED, PREEMPTED

_ended: list[int] = []


def catch_end() -> None:
    """Lets SIGTERM to this worker mean: stop at a checkpoint. For the main thread, before the training's own begins.

    A second one ends the process, and so does Ray itself where its raylet is gone.
    """
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: object) -> None:
        _ended.append(number)
        signal.signal(signal.SIGTERM, before)

    _ended.clear()
    signal.signal(signal.SIGTERM, end)


def wants_to_stop() -> str:
    """INTERRUPTED or PREEMPTED; empty as long as neither is so."""
    if _ended:
        return INTERRUPTED
    return PREEMPTED if _is_preempted() else ""


def _is_preempted() -> bool:
    """What Ray's watcher of draining nodes has told this worker. `ray.train.get_preemption_info` would wait for all
    ranks."""
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    return False
