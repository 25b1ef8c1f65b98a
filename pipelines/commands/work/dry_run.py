"""Prints what a command would do: configuration, placement and the state of each step. Runs nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from data_shards.renamed import both_words
from data_shards.store import Store
from pipelines.cluster import ray_session
from pipelines.commands.summary import print_plan
from pipelines.commands.work.connect import check_source
from pipelines.commands.work.options import Resolved
from pipelines.demand import RunDemand
from pipelines.flow import Step, StepState, plan_steps
from pipelines.initial_weights import InitialWeights
from pipelines.placement import Placement


def dry_run(work: Resolved, workflow: str, steps: Sequence[Step], store: Store, init: InitialWeights | None) -> None:
    """Prints what would be done. Raises what the command itself would raise before its first step."""
    states = plan_steps(steps, store, work.run)
    recipe_values = work.values.model_dump(mode="json")
    resolved: dict[str, Any] = {"run": work.run, "store": store.uri, "workflow": workflow, "recipe": recipe_values}
    check_source(work, states, store)
    notes = [init.summary] if init is not None else []
    placement = _preview(work, steps, states, store, say=notes.append)
    where = f"Ray at {os.environ['RAY_ADDRESS']}" if os.environ.get("RAY_ADDRESS") else "this machine"
    if work.json:
        resolved["recipe"] = both_words(recipe_values)
        resolved["placement"] = both_words(placement.model_dump(mode="json"), placement.PART) if placement else None
        resolved |= {"placed_on": where if placement else None, "notes": notes}
        print(json.dumps({**resolved, "steps": {state.name: state.state for state in states}}, indent=2))
        return
    print(json.dumps(resolved, indent=2))
    print_plan(states)
    for line in [f"placement on {where}: {placement.summary}", *notes] if placement else notes:
        print(line)


def _preview(
    work: Resolved, steps: Sequence[Step], states: Sequence[StepState], store: Store, *, say: Callable[[str], None]
) -> Placement | None:
    """The placement that the work would get; None if no remaining step needs Ray."""
    spread = {step.name for step in steps if step.is_spread}
    if all(state.state == "done" for state in states if state.name in spread):
        return None
    demand = RunDemand(work.values, states, store, work.run)
    placement = ray_session.preview(work.placement, store, demand.for_placement(), say=say)
    demand.check(placement)
    return placement
