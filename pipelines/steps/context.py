"""What every step is handed: the store, the run, its placement, MLflow, and who listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_shards.store import Store
from pipelines.flow.step import Show
from pipelines.placement import Placement
from pipelines.tracking.runs import Tracking


@dataclass(frozen=True)
class StepContext:
    """What every step of one run shares.

    `placement` says how the work is spread, None where no step is; `check` raises where this driver does not hold the
    run any more; `profile` asks for a profile of whatever can be profiled; `until` is when the command's time is up, on
    the monotonic clock (0: never).
    """

    store: Store
    run: str
    placement: Placement | None
    tracking: Tracking
    show: Show
    check: Callable[[], None] = lambda: None
    profile: bool = False
    until: float = 0.0
