"""What a step is, and what it is handed when it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from data_shards.store import Store


@dataclass(frozen=True)
class StepContext:
    """What every step of one run shares: where it writes, under which name, and who listens.

    `placement` says how the work is spread, None where no step is; `tracking` is the MLflow seam; `show` tells the
    person at the terminal; `check` raises where this driver does not hold the run any more; `profile`
    asks for a profile of whatever can be profiled; `until` is when the command's time is up, on the monotonic clock (0:
    never).
    """

    store: Store
    run: str
    placement: Any
    tracking: Any
    show: Any
    check: Callable[[], None] = lambda: None
    profile: bool = False
    until: float = 0.0


@dataclass(frozen=True)
class Step:
    """A name, a config and its inputs (parameter of `run` -> name of the step whose facts it takes).

    `run(config, placement, out, context, **inputs)` writes under `out` and returns small JSON facts with a
    "digest": the content of what it made, which is what a later step's identity holds. `is_spread` is False for one
    whose work is done by the driver alone, without Ray. `binds_on_refusal` is False for one that leaves nothing behind
    when it refuses its configuration: the run may then be given another one.
    """

    name: str
    run: Callable[..., dict]
    config: BaseModel
    inputs: Mapping[str, str] = field(default_factory=dict)
    is_spread: bool = True
    binds_on_refusal: bool = True
