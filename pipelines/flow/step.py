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

    `placement` says how the work is spread; `tracking` is the MLflow seam; `show` tells the person at the terminal.
    """

    store: Store
    run: str
    placement: Any
    tracking: Any
    show: Any


@dataclass(frozen=True)
class Step:
    """A name, a config and its inputs (parameter of `run` -> name of the step whose facts it takes).

    `run(config, placement, out, context, **inputs)` writes under `out` and returns small JSON facts with a
    "digest": the content of what it made, which is what a later step's identity holds.
    """

    name: str
    run: Callable[..., dict]
    config: BaseModel
    inputs: Mapping[str, str] = field(default_factory=dict)
