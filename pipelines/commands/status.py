"""The command status: lists the runs of a store and the states of their steps."""

from __future__ import annotations

import json
from dataclasses import dataclass

import tyro

from data_shards.renamed import both_keys
from pipelines.commands.run_states import read_status
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, JsonOption, StoreOption
from pipelines.console.terminal import console, table


@dataclass(frozen=True)
class StatusArguments(StoreOption, JsonOption):
    """Arguments of `status`."""

    run: tyro.conf.Positional[str] = ""
    """Run to show. Empty: all."""


def status(asked: StatusArguments) -> int:
    """Prints the steps of one run or of all, in the order in which they finished."""
    store = asked.open_store()
    rows = read_status(store, asked.run)
    if asked.run and not rows:
        raise UsageError(f"run {asked.run!r} not found in {store.uri}; `medmamba status` lists all runs")
    if asked.json:
        print(json.dumps([both_keys(row) for row in rows], indent=2))
    elif not rows:
        console().print(f"no runs in {store.uri} yet; `medmamba quickstart` starts one")
    else:
        shown = [
            (r["run"], r["step"], r["state"], (r["finished"] or "")[:16].replace("T", " "), r["told"]) for r in rows
        ]
        table(f"Runs in {store.uri}", ("run", "step", "state", "finished", "facts"), shown)
    return 0


STATUS = Command("status", "List the runs in the store and the states of their steps.", StatusArguments, status)
