"""The context of a step: the store, the run, its placement, MLflow, and the output for the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_shards.store import Store
from pipelines.flow.step import Show
from pipelines.placement import Placement
from pipelines.tracking.runs import Tracking


@dataclass(frozen=True)
class StepContext:
    """What all steps of one run share.

    `placement` says how the work is distributed, None if no step is; `check` raises if this driver no longer holds the
    run; `profile` requests a profile of the training; `until` is when the command's time is up, in seconds of the
    monotonic clock (0: never).
    """

    store: Store
    run: str
    placement: Placement | None
    tracking: Tracking
    show: Show
    check: Callable[[], None] = lambda: None
    profile: bool = False
    until: float = 0.0
