"""A step of a workflow, and the context in which it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from data_shards.store import Store
from pipelines.flow.facts import Facts


class Show(Protocol):
    """Where a step reports its progress to the user."""

    def say(self, text: str) -> None:
        """Prints one line."""

    def begin(self, what: str) -> None:
        """Reports the start of work that has no progress."""

    def ready(self) -> None:
        """Reports the end of the work of the last `begin`."""

    def progress(self, name: str, values: dict[str, Any]) -> None:
        """Reports the progress of `name`: {"done", "total", "unit"}, or what a training reports."""

    def step(self, name: str, state: str) -> None:
        """Reports that a step starts, resumes, is done or failed."""

    def trace(self, text: str) -> None:
        """Reports the traceback of an unexpected error."""


class Context(Protocol):
    """The part of a step's context (`pipelines.steps.context`) that the runner needs."""

    @property
    def store(self) -> Store:
        """The store of the run."""

    @property
    def placement(self) -> BaseModel | None:
        """How the work is distributed; None if no step is."""

    @property
    def check(self) -> Callable[[], None]:
        """Raises if this driver no longer holds the run."""


@dataclass(frozen=True)
class Step:
    """A name, a config and its inputs (parameter of `run` -> name of the step whose facts it takes).

    `run(config, placement, out, context, **inputs)` writes under `out` and returns small JSON facts that fit `facts`.
    Their "digest" is the hash of what it produced and part of the identity of later steps. `is_spread` is False for a
    step that the driver does alone, without Ray. `binds_on_refusal` is False for a step that stores nothing when it
    rejects its configuration: the run can then be repeated with another one.
    """

    name: str
    run: Callable[..., dict[str, Any]]
    config: BaseModel
    inputs: Mapping[str, str] = field(default_factory=dict)
    is_spread: bool = True
    binds_on_refusal: bool = True
    facts: type[Facts] = Facts
