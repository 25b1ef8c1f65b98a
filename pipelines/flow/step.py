"""What a step is, and what it is handed when it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from data_shards.store import Store
from pipelines.flow.facts import Facts


class Show(Protocol):
    """Where a step tells the user how far it is."""

    def say(self, text: str) -> None:
        """One line."""

    def begin(self, what: str) -> None:
        """Something that shows no progress of its own starts."""

    def ready(self) -> None:
        """What began last is there."""

    def progress(self, name: str, values: dict[str, Any]) -> None:
        """How far `name` is: {"done", "total", "unit"}, or what a training reports."""

    def step(self, name: str, state: str) -> None:
        """A step starts, resumes, is done or failed."""

    def trace(self, text: str) -> None:
        """The traceback of an error that was not foreseen."""


class Context(Protocol):
    """What the runner needs of that which every step of one run is handed (`pipelines.steps.context`)."""

    @property
    def store(self) -> Store:
        """Where the run is."""

    @property
    def placement(self) -> BaseModel | None:
        """How the work is spread, None where no step is."""

    @property
    def check(self) -> Callable[[], None]:
        """Raises where this driver does not hold the run any more."""


@dataclass(frozen=True)
class Step:
    """A name, a config and its inputs (parameter of `run` -> name of the step whose facts it takes).

    `run(config, placement, out, context, **inputs)` writes under `out` and returns small JSON facts that fit `facts`,
    with a "digest": the content of what it made, which is what a later step's identity holds. `is_spread` is False for
    one whose work is done by the driver alone, without Ray. `binds_on_refusal` is False for one that leaves nothing
    behind when it refuses its configuration: the run may then be given another one.
    """

    name: str
    run: Callable[..., dict]
    config: BaseModel
    inputs: Mapping[str, str] = field(default_factory=dict)
    is_spread: bool = True
    binds_on_refusal: bool = True
    facts: type[Facts] = Facts
