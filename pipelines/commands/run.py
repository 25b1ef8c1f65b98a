"""The commands run and quickstart: a complete workflow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from pipelines.commands.work.begun import workflow_of
from pipelines.commands.work.bring import bring, steps_until
from pipelines.commands.work.options import BEHAVIOR, RunWork
from pipelines.commands.work.read import read_work
from pipelines.console.command import Command


def run(work: RunWork) -> int:
    """Runs the workflow, up to `work.until` if that is given; returns the exit code."""
    workflow = workflow_of(work, otherwise="release")
    return bring(work, workflow, functools.partial(steps_until, workflow, last=work.until))


def _read_quickstart(command: Command, argv: Sequence[str]) -> Any:
    return read_work(command, ["release", "--recipe", "quickstart", *argv])


RUN = Command(
    "run", "Run a complete workflow: images in, a promoted model out.", RunWork, run, BEHAVIOR, read=read_work
)
QUICKSTART = Command(
    "quickstart",
    "Try the complete workflow on synthetic images, on this machine, in minutes.",
    RunWork,
    run,
    BEHAVIOR,
    read=_read_quickstart,
)
