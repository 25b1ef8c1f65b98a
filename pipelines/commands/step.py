"""The commands shard, tune, train, evaluate and register: one step and the steps that it depends on."""

from __future__ import annotations

import functools
from typing import Any

from pipelines.commands.work.begun import workflow_of
from pipelines.commands.work.bring import bring, steps_until
from pipelines.commands.work.options import STEP_BEHAVIOR, EvaluateWork, StepWork, TrainWork
from pipelines.commands.work.read import read_work
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command


def bring_step(work: StepWork, *, step: str) -> int:
    """Runs a step and the steps that it depends on; returns the exit code."""
    workflow = workflow_of(work, otherwise="release" if step == "tune" else "direct")
    return bring(work, workflow, functools.partial(steps_until, workflow, last=step))


def evaluate(work: EvaluateWork[Any, Any]) -> int:
    """Runs the step, or with --on evaluates on another dataset; returns the exit code."""
    if work.on:
        from pipelines.commands.work.other_dataset import evaluate_on

        return evaluate_on(work)
    if work.class_map or work.split != "test":
        raise UsageError("evaluate: --class-map and --split belong to --on DATASET")
    return bring_step(work, step="evaluate")


def _command(step: str, text: str, arguments: type = StepWork) -> Command:
    return Command(step, text, arguments, functools.partial(bring_step, step=step), STEP_BEHAVIOR, read=read_work)


SHARD = _command("shard", "Convert an image set into shards, an index and a manifest.")
TUNE = _command("tune", "Search hyperparameters with Ray Tune.")
TRAIN = _command("train", "Train with Ray Train and DeepSpeed.", TrainWork)
EVALUATE = Command(
    "evaluate",
    "Evaluate the trained model on the test split.",
    EvaluateWork,
    evaluate,
    f"{STEP_BEHAVIOR} With --on, evaluates the run's finished model on another dataset.",
    read=read_work,
)
REGISTER = _command("register", "Register the trained model in MLflow.")
