"""A finished run in a store: real records of the real steps' identities, their work replaced by given facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_shards.store import open_store
from pipelines.commands.work.begun import WORKFLOW_FILE
from pipelines.console.terminal import Terminal
from pipelines.flow import Step, WorkflowError, run_steps
from pipelines.flow.record import to_json
from pipelines.placement import Node, PlacementConfig, resolve
from pipelines.recipes import Recipe
from pipelines.steps.context import StepContext
from pipelines.workflows import WORKFLOWS, until

METRICS = {name: 0.9 for name in ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1")}
FACTS: dict[str, dict[str, Any]] = {
    "shard": {
        "digest": "5" * 64, "data": "datasets/phantoms/default",
        "counts": {"val": {"a": 2}, "train": {"a": 6, "b": 4}},
        "num_shards": 2, "num_images": 12, "quarantine": 1,
    },
    "tune": {
        "digest": "t", "winner": {"train.optim.lr": 0.00234567}, "winner_trial": "t1",
        "trials": [
            {"stopped_early": False, "error": None}, {"stopped_early": True, "error": None},
            {"stopped_early": True, "error": "boom"},
        ],
    },
    "train": {
        "digest": "w", "model": "runs/r/train/model", "best_epoch": 3, "epochs": 4, "metrics": {"val_auc": 0.9123},
    },
    "evaluate": {
        "digest": "e", "predictions": "runs/r/evaluate/predictions.parquet", "num_samples": 120, "metrics": METRICS,
        "baselines": {"chance": {"auc": 0.5, "accuracy": 0.4}, "pixels": {"auc": 0.7, "accuracy": 0.6}},
    },
    "report": {"digest": "d", "page": "runs/r/report/report.html", "card": "runs/r/report/card.json"},
    "register": {"digest": "r", "model": "medmamba-phantoms", "version": 7},
    "promote": {"digest": "p", "verdict": "yes", "reason": "there is no champion yet", "alias": "champion",
        "model": "medmamba-phantoms",
    },
}  # fmt: skip
NO = {"digest": "p", "verdict": "no", "reason": "0.8 of version 7 is below the champion's 0.9", "alias": "champion"}


def finish(
    uri: str,
    run: str,
    recipe: Recipe,
    *,
    workflow: str = "release",
    last: str = "promote",
    failing: Sequence[str] = (),
    **facts: dict[str, Any],
) -> None:
    """Brings `run` to `last`; steps named in `failing` are left interrupted. `facts` replaces those of steps."""
    store = open_store(uri)
    steps = WORKFLOWS[workflow](recipe)
    if last != "promote":  # the last step, but it does not need the report
        steps = until(steps, last)
    steps = [_with_facts(step, failing, FACTS | facts) for step in steps]
    quiet = Terminal(quiet=True)
    placement = resolve(PlacementConfig(), [Node(2)])

    def open_context() -> StepContext:
        return StepContext(store, run, placement, tracking=None, show=quiet)

    kept = {"workflow": workflow, "recipe": recipe.model_dump(mode="json")}
    store.at("runs", run).put(WORKFLOW_FILE, to_json(kept))
    try:
        run_steps(steps, store, run, open_context=open_context, show=quiet)
    except WorkflowError as error:
        if set(error.failures) != set(failing):
            raise


def _with_facts(step: Step, failing: Sequence[str], facts: dict[str, dict[str, Any]]) -> Step:
    def work(config: Any, placement: Any, out: Any, context: Any, **inputs: dict) -> dict:
        if step.name in failing:
            raise ValueError("stopped by the test")
        return facts[step.name]

    return replace(step, run=work)
