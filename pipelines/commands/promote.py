"""The command promote: runs the gate, and with --force moves the alias even if the gate rejects."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_shards.store import Store
from pipelines.commands.step import bring_step
from pipelines.commands.work.begun import workflow_of
from pipelines.commands.work.bring import bring
from pipelines.commands.work.options import STEP_BEHAVIOR, PromoteWork, Resolved
from pipelines.commands.work.read import read_work
from pipelines.console.command import Command, open_named
from pipelines.flow import Record, Step
from pipelines.flow.record import read_record
from pipelines.flow.runner import step_folder
from pipelines.override import override
from pipelines.recipes import Recipe
from pipelines.tracking import open_tracking
from pipelines.tracking.registry import by_alias
from pipelines.workflows import WORKFLOWS, until


def promote(work: PromoteWork) -> int:
    """Runs the gate, or with --force moves the alias in any case; returns the exit code, 3 if the gate rejects."""
    if not work.force:
        return bring_step(work, step="promote")
    workflow = workflow_of(work, otherwise="direct")
    return bring(work, workflow, functools.partial(forced_steps, work, workflow))


def forced_steps(work: Resolved, workflow: str, values: Recipe) -> list[Step]:
    """The steps of a forced promotion; the verdict that the gate has recorded stays.

    If the alias has moved elsewhere since the last forced promotion, there is another one (promote-forced-2, ...).
    """
    steps = WORKFLOWS[workflow](values)
    gate = next(step for step in steps if step.name == "promote")
    store, name = open_named(work.store), "promote-forced"
    made: list[tuple[str, Record]] = []
    while record := read_record(step_folder(store, work.run, name)):
        made.append((name, record))
        name = f"promote-forced-{len(made) + 1}"
    if made and _holds(store, made[-1][1].facts):
        name = made[-1][0]
    forced = replace(gate, name=name, config=override(gate.config, {"force": True}))
    return until([*steps, forced], name)


def _holds(store: Store, promoted: Mapping[str, Any]) -> bool:
    """Whether the alias still points to the version of this finished promotion."""
    now = by_alias(open_tracking(store), promoted["model"], promoted["alias"])
    return now is not None and now.number == promoted["version"]


PROMOTE = Command(
    "promote",
    "Give the registered version the alias champion if the gate accepts it.",
    PromoteWork,
    promote,
    f"Exit code 3 if the gate rejects it. {STEP_BEHAVIOR}",
    read=read_work,
)
