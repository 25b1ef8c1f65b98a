"""The command promote: the gate, and what moves the alias although it said no."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_shards.store import Store
from pipelines.commands.step import bring_step
from pipelines.commands.work.begun import workflow_of
from pipelines.commands.work.bring import bring
from pipelines.commands.work.options import BEHAVIOUR, PromoteWork, Resolved
from pipelines.commands.work.read import read_work
from pipelines.console.command import Command, open_named
from pipelines.flow import Record, Step
from pipelines.flow.record import read_record
from pipelines.flow.runner import step_folder
from pipelines.override import override
from pipelines.recipes import Recipe
from pipelines.workflows import WORKFLOWS, until


def promote(work: PromoteWork) -> int:
    """Asks the gate, and with --force moves the alias in any case; returns the exit code, 3 where the gate says no."""
    if not work.force:
        return bring_step(work, step="promote")
    workflow = workflow_of(work, otherwise="direct")
    return bring(work, workflow, functools.partial(forced_steps, work, workflow))


def forced_steps(work: Resolved, workflow: str, values: Recipe) -> list[Step]:
    """What a promotion needs that does not ask the gate, and it; the gate's own verdict stays as it was recorded.

    Forcing is an act: where the alias has gone elsewhere since the last one, there is another (promote-forced-2, ...).
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
    """Whether the alias still points to the version that a finished promotion gave it to."""
    from pipelines.tracking import open_tracking
    from pipelines.tracking.registry import by_alias

    now = by_alias(open_tracking(store), promoted["model"], promoted["alias"])
    return now is not None and now.number == promoted["version"]


PROMOTE = Command(
    "promote",
    "Give the version the alias champion, if the gate says yes.",
    PromoteWork,
    promote,
    f"Exit code 3 if it says no. {BEHAVIOUR}",
    read=read_work,
)
