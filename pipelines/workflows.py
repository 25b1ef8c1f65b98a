"""Each workflow is a function from a recipe to its steps: the complete graph on one screen."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.flow import Step
from pipelines.recipes import Recipe
from pipelines.steps import evaluate, promote, register, report, shard, train, tune
from pipelines.steps.facts import (
    EvaluateFacts,
    PromoteFacts,
    RegisterFacts,
    ReportFacts,
    ShardFacts,
    TrainFacts,
    TuneFacts,
)
from pipelines.steps.search import TuneStepConfig
from pipelines.worker.config import TrainStepConfig


def release(recipe: Recipe) -> list[Step]:
    """Images in, a promoted model out: shard, tune, train with the winner, evaluate, report, register, promote."""
    training = TrainStepConfig(model=recipe.model, train=recipe.train)
    return [
        Step("shard", shard.run, recipe.data, binds_on_refusal=False, facts=ShardFacts),
        Step("tune", tune.run, TuneStepConfig(start=training, tune=recipe.tune), {"shard": "shard"}, facts=TuneFacts),
        Step("train", train.run, training, {"shard": "shard", "tune": "tune"}, facts=TrainFacts),
        *_judge(recipe),
    ]


def direct(recipe: Recipe) -> list[Step]:
    """Without a sweep: shard, train with the recipe's values, evaluate, report, register, promote."""
    training = TrainStepConfig(model=recipe.model, train=recipe.train)
    return [
        Step("shard", shard.run, recipe.data, binds_on_refusal=False, facts=ShardFacts),
        Step("train", train.run, training, {"shard": "shard"}, facts=TrainFacts),
        *_judge(recipe),
    ]


def _judge(recipe: Recipe) -> list[Step]:
    return [
        Step("evaluate", evaluate.run, recipe.evaluate, {"shard": "shard", "train": "train"}, facts=EvaluateFacts),
        Step(
            "report",
            report.run,
            report.ReportConfig(),
            {name: name for name in ("shard", "train", "evaluate")},
            is_spread=False,
            facts=ReportFacts,
        ),
        Step(
            "register",
            register.run,
            recipe.registry,
            {name: name for name in ("shard", "train", "evaluate")},
            is_spread=False,
            facts=RegisterFacts,
        ),
        Step("promote", promote.run, recipe.gate, {"register": "register"}, is_spread=False, facts=PromoteFacts),
    ]


WORKFLOWS: dict[str, Callable[[Recipe], list[Step]]] = {"release": release, "direct": direct}


def until(steps: list[Step], last: str) -> list[Step]:
    """The step named `last` and everything it needs; raises ValueError if the workflow has no such step."""
    by_name = {step.name: step for step in steps}
    if last not in by_name:
        raise ValueError(f"unknown step {last!r} in this workflow; available: {', '.join(by_name)}")
    needed, open_ends = set(), [last]
    while open_ends:
        name = open_ends.pop()
        needed.add(name)
        open_ends.extend(by_name[name].inputs.values())
    return [step for step in steps if step.name in needed]
