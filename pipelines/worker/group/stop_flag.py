"""Whether this worker should stop: its process received SIGTERM, or its node will be preempted."""

from __future__ import annotations

import contextlib
import signal

from pipelines.cluster.monitor import INTERRUPTED, PREEMPTED

_ended: list[int] = []


def catch_end() -> None:
    """Makes SIGTERM stop this worker at a checkpoint. Call it in the main thread, before the training thread starts.

    A second SIGTERM ends the process.
    """
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: object) -> None:
        _ended.append(number)
        signal.signal(signal.SIGTERM, before)

    _ended.clear()
    signal.signal(signal.SIGTERM, end)


def wants_to_stop() -> str:
    """INTERRUPTED, PREEMPTED, or empty if neither applies."""
    if _ended:
        return INTERRUPTED
    return PREEMPTED if _is_preempted() else ""


def _is_preempted() -> bool:
    """Whether Ray has notified this worker that its node is draining.

    The public `ray.train.get_preemption_info` would wait for all ranks.
    """
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    return False
