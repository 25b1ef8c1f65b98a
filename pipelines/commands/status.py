"""The command status: lists the runs of a store and the states of their steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tyro

from data_shards.renamed import both_keys
from data_shards.store import Store
from pipelines.commands.run_states import read_status
from pipelines.commands.study.stored import find_study
from pipelines.commands.study.tables import print_study
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, JsonOption, StoreOption
from pipelines.console.terminal import console, table
from pipelines.flow.record import read_record


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
        both = [both_keys(row) for row in rows]
        print(json.dumps([_complete(row, store) if asked.run else row for row in both], indent=2))
    elif not rows:
        console().print(f"no runs in {store.uri} yet; `medmamba quickstart` starts one")
    else:
        shown = [
            (r["run"], r["step"], r["state"], (r["finished"] or "")[:16].replace("T", " "), r["told"]) for r in rows
        ]
        table(f"Runs in {store.uri}", ("run", "step", "state", "finished", "facts"), shown)
        if asked.run:
            _print_study(store, asked.run)
    return 0


def _print_study(store: Store, run: str) -> None:
    """Prints the study of the run's evaluation, if it has one, and where it is stored."""
    facts = _evaluation(store, run)
    study, reason = find_study(store, facts)
    if study is not None:
        print_study(study)
        console().print(f"complete study: {store.uri}/{facts['study']}", soft_wrap=True)
    elif reason:
        console().print(reason, soft_wrap=True)


def _complete(row: dict[str, Any], store: Store) -> dict[str, Any]:
    """The row of an evaluation with its study as `evaluation`."""
    if (row["step"], row["state"]) != ("evaluate", "done"):
        return row
    study, _ = find_study(store, _evaluation(store, row["run"]))
    return row if study is None else {**row, "evaluation": study.model_dump(mode="json")}


def _evaluation(store: Store, run: str) -> dict[str, Any]:
    record = read_record(store.at("runs", run, "evaluate"))
    return {} if record is None else record.facts


STATUS = Command("status", "List the runs in the store and the states of their steps.", StatusArguments, status)
