"""A sweep over the training's hyperparameters: Ray Tune with Optuna and ASHA; its winner is a dict of overrides."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_shards.store import Store
from data_shards.store.fenced_lease import is_lost
from pipelines.cluster.board import Watch
from pipelines.faults import RESUME
from pipelines.flow import StepContext
from pipelines.initial_weights import begin_from, kept_uri
from pipelines.override import flatten, override
from pipelines.placement import Placement
from pipelines.steps.train import check_batches
from pipelines.sweep.ledger import Ledger, TrialRecord
from pipelines.sweep.pickled import drop_pickled
from pipelines.sweep.suggestion import lies_in, misfit, suggest
from pipelines.sweep.trial import trial
from pipelines.tracking import Tracking, TrackingError
from pipelines.tracking.outbox import Outbox
from pipelines.worker.config import TrainStepConfig


class SearchSpace(BaseModel):
    """What a sweep tries. An empty value leaves that field as the recipe has it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lr: tuple[float, ...] = (3e-4, 5e-3)
    """Lowest and highest train.optim.lr, drawn log-uniformly."""
    weight_decay: tuple[float, ...] = (1e-5, 1e-1)
    """Lowest and highest train.optim.weight_decay, drawn log-uniformly."""
    drop_path: tuple[float, ...] = (0.0, 0.3)
    """Lowest and highest model.drop_path, drawn uniformly (MedMamba only)."""
    batch_size: tuple[int, ...] = ()
    """Values of train.batch_size to choose from; each a multiple of train.micro_batch."""

    @model_validator(mode="after")
    def _ordered(self) -> SearchSpace:
        for name in ("lr", "weight_decay", "drop_path"):
            bounds = getattr(self, name)
            if len(bounds) not in (0, 2):
                raise ValueError(f"{name} {bounds}: give the lowest and the highest value, or none not to search it")
            if bounds and bounds[0] >= bounds[1]:
                raise ValueError(f"{name} {bounds}: the lowest value must be below the highest; swap them")
            if bounds and bounds[0] <= 0 and name != "drop_path":
                raise ValueError(f"{name} {bounds}: it is drawn log-uniformly, so it must be above 0; raise the lowest")
        return self

    def bounds(self, start: TrainStepConfig) -> dict[str, tuple[float, ...]]:
        """Dotted key of the recipe -> its lowest and highest value, of what is searched and `start` has."""
        named = {
            "train.optim.lr": self.lr,
            "train.optim.weight_decay": self.weight_decay,
            "model.drop_path": self.drop_path,
        }
        own = flatten(start.model_dump())
        return {key: bounds for key, bounds in named.items() if bounds and key in own}


class TuneConfig(BaseModel):
    """How hyperparameters are searched (`recipe.tune`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trials: int = Field(8, ge=1)
    """Trials in the sweep. The first one is the recipe as it stands, where that lies in the space."""
    epochs: int = Field(5, ge=1)
    """Epochs of the longest trial."""
    grace_epochs: int = Field(1, ge=1)
    """Epochs every trial gets before ASHA may stop it."""
    reduction_factor: int = Field(3, ge=2)
    """ASHA lets one in this many trials continue at each rung."""
    seed: int = Field(0, ge=0)
    """Seed of the search."""
    space: SearchSpace = SearchSpace()
    """What is searched."""


class TuneStepConfig(BaseModel):
    """Identity of a sweep: the recipe it starts from, and how it searches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: TrainStepConfig
    tune: TuneConfig

    @model_validator(mode="after")
    def _searchable(self) -> TuneStepConfig:
        for size in self.tune.space.batch_size:
            if size % self.start.train.micro_batch:
                raise ValueError(
                    f"tune.space.batch_size {size} is no multiple of train.micro_batch {self.start.train.micro_batch}; "
                    f"choose multiples, or lower micro_batch"
                )
        searched = self.tune.space.bounds(self.start)
        if not searched and not self.tune.space.batch_size:
            raise ValueError(
                "tune.space is empty: give at least one field a range, or run the workflow without a sweep"
            )
        for key, bounds in searched.items():
            for bound in bounds:
                override(self.start, {key: bound})  # a trial must not be what finds out
        return self


def run(config: TuneStepConfig, placement: Placement, out: Store, context: StepContext, *, shard: dict) -> dict:
    """Runs or resumes the sweep; returns the winner, a dict of dotted overrides, and a row for each trial.

    The winner has the highest validation AUC of any epoch, ties broken by validation loss.
    Raises ValueError where every trial failed, where one failed for another reason than that it diverged, and where
    the sweep was ended before its last trial: the step is then not finished, and asked again it goes on.
    """
    tracking = context.tracking
    params = {"trials": config.tune.trials, "epochs": config.tune.epochs, **config.tune.space.model_dump()}
    with tracking.running(out, run=context.run, step="tune", check=context.check, params=params) as parent:
        config.start.with_classes(len(shard["counts"]["train"]))  # else every trial would find out
        check_batches(config.tune.space.batch_size or (config.start.train.batch_size,), shard, context)
        tracking.log_params(parent, {"init": begin_from(config.start, shard, context)})
        payload = {
            "config": override(config.start, {"train.epochs": config.tune.epochs}).model_dump(),
            "trials": config.tune.trials,
            "out": out,
            "placement": placement.for_trial().model_dump(),
            "dataset": (context.store.at(shard["data"]), shard["digest"]),
            "init": kept_uri(config.start, context.store),
            "parent": parent,
            "tracking": tracking,
        }
        try:
            ledger, errors = _sweep(config, payload, placement, out, context)
            runs = {record.number: _end_run(tracking, parent, record) for record in ledger.records()}
            trials = [{**_row(record, config), "mlflow_run": runs[record.number]} for record in ledger.records()]
            tracking.drop_trials(parent, [row["trial"] for row in trials])
        except BaseException:
            # What ended the sweep is what must be told, not that MLflow could not be told of it.
            quick = tracking.impatient
            with contextlib.suppress(TrackingError):
                if not is_lost(context.check):  # else they are the trials of the driver that took over
                    quick.finish(parent, "KILLED")  # first: a trial that begins its run now ends it, see find_trial
                    quick.close_trials(parent)
            raise
        _check_reasons(ledger, errors)
        winner = _winner(trials)
        tracking.log_metrics(parent, winner["metrics"], step=winner["epochs"])
        ledger.delete_checkpoints()
    overrides = winner["overrides"]
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()
    return {
        "digest": digest,
        "winner": overrides,
        "winner_trial": winner["trial"],
        "winner_number": winner["number"],
        "trials": trials,
        "mlflow_run": parent,
    }


def search_space(config: TuneStepConfig) -> dict[str, Any]:
    """Dotted key of the recipe -> the distribution that Optuna draws it from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space = config.tune.space
    drawn: dict[str, Any] = {
        key: FloatDistribution(bounds[0], bounds[1], log=key != "model.drop_path")
        for key, bounds in space.bounds(config.start).items()
    }
    return drawn | ({"train.batch_size": CategoricalDistribution(space.batch_size)} if space.batch_size else {})


def _sweep(
    config: TuneStepConfig, payload: dict, placement: Placement, out: Store, context: StepContext
) -> tuple[Ledger, dict[int, BaseException]]:
    """Runs what is left of the sweep; returns its ledger, and the errors of the trials that failed now."""
    tune, space = config.tune, search_space(config)
    ledger = Ledger(out, check=context.check)
    ledger.read(functools.partial(misfit, space=space, trials=tune.trials, epochs=tune.epochs), context.show.say)
    drop_pickled(out, ledger, context.show.say)
    numbers = ledger.to_do(tune.trials)
    if ledger.records():
        context.show.say(_resumed(ledger, tune.trials))
    if not numbers:
        return ledger, {}
    from pipelines.sweep.seams import Asha, Keeper, Search, run_trials

    payload["tracking"].reopen_trials(payload["parent"])
    search = Search(ledger, numbers, _chooser(config, space, ledger, context))
    keeper = Keeper(ledger, payload["tracking"], payload["parent"], trials=tune.trials, epochs=tune.epochs)
    asha = Asha(tune.epochs, tune.grace_epochs, tune.reduction_factor)
    asha.refill(ledger)
    at_once = min(placement.trials, len(numbers))
    with Watch(context.show.progress) as board:
        context.show.begin(f"starting {len(numbers)} trials, {at_once} at once")  # until the first step of one
        trainable = _trainable({**payload, "board": board}, placement.for_trial())
        run_trials(trainable, search, asha, keeper, trials=len(numbers), at_once=at_once)
    if left := set(ledger.to_do(tune.trials)) - keeper.errors.keys():
        raise ValueError(f"the sweep was ended with {len(left)} of {tune.trials} trials left; {RESUME}")
    return ledger, keeper.errors


def _chooser(
    config: TuneStepConfig, space: dict[str, Any], ledger: Ledger, context: StepContext
) -> Callable[[int], dict[str, Any]]:
    """What returns the overrides of a new trial, by its number."""
    begun = {record.number for record in ledger.records()}
    recipe = [] if 1 in begun else _recipe_point(config, space, context)

    def choose(number: int) -> dict[str, Any]:
        if number == 1 and recipe:
            return recipe[0]
        return suggest(space, seed=config.tune.seed, number=number, over=ledger.over())

    return choose


def _trainable(payload: dict, placement: Placement) -> Any:
    """What Tune runs for each trial, with the resources of one."""
    from ray import tune

    resources = {"CPU": placement.cpus_per_worker} | ({"GPU": 1} if placement.device == "cuda" else {})
    return tune.with_resources(functools.partial(trial, payload=payload), resources)


def _resumed(ledger: Ledger, trials: int) -> str:
    """The line about a sweep that resumes."""
    over, epochs = len(ledger.over()), sum(len(record.epochs) for record in ledger.records())
    return f"the sweep resumes where it was interrupted: {over} of {trials} trials are over, {epochs} epochs are kept"


def complete_run(tracking: Tracking, run_id: str, record: TrialRecord) -> None:
    """Logs the epochs that a trial's run lacks: one that ASHA stops, or whose process is killed, may not have sent its
    last ones."""
    with Outbox(tracking, run_id) as outbox:
        outbox.resume({"step": 0, **each.metrics, "epoch": epoch} for epoch, each in enumerate(record.epochs, 1))


def _end_run(tracking: Tracking, parent: str, record: TrialRecord) -> str:
    """Ends a trial's run in MLflow, with every epoch; returns its id."""
    run_id = tracking.trial_run(parent, record.id)
    complete_run(tracking, run_id, record)
    tracking.finish(run_id, "FAILED" if record.reason else "FINISHED")
    return run_id


def _check_reasons(ledger: Ledger, errors: Mapping[int, BaseException]) -> None:
    """Raises ValueError where a trial failed for another reason than its hyperparameters: that may pass."""
    failed = [record for record in ledger.records() if record.state == "failed"]
    if failed:
        line = failed[0].reason.removesuffix(f": {RESUME}").removesuffix(f", then {RESUME}")
        raise ValueError(
            f"{len(failed)} of {len(ledger.records())} trials failed for reasons other than divergence "
            f"({line}); fix the cause and run the same command to try them again"
        ) from errors.get(failed[0].number)


def _recipe_point(config: TuneStepConfig, space: dict[str, Any], context: StepContext) -> list[dict[str, Any]]:
    """The recipe's own values as the first trial, where they lie in the space: a sweep never does worse than it.

    Says aloud where they do not.
    """
    own = flatten(config.start.model_dump())
    point = {key: own[key] for key in space}
    for key, value in point.items():
        if not lies_in(space[key], value):
            context.show.say(f"the recipe is not a trial of its sweep: its {key} {value:g} is outside tune.space")
            return []
    return [point]


def _row(record: TrialRecord, config: TuneStepConfig) -> dict:
    shown = {key: record.last[key] for key in ("val_auc", "val_loss", "val_accuracy") if key in record.last}
    best = {f"best_{name}": record.best[f"val_{name}"] for name in ("auc", "loss") if record.best}
    return {
        "trial": record.id,
        "number": record.number,
        "overrides": dict(record.overrides),
        "epochs": len(record.epochs),
        "metrics": shown | best,
        "stopped_early": len(record.epochs) < config.tune.epochs,
        "error": record.reason or None,
    }


def _winner(trials: list[dict]) -> dict:
    finished = [row for row in trials if not row["error"] and "best_auc" in row["metrics"]]
    if not finished:
        reasons = "; ".join(sorted({str(row["error"]) for row in trials}))
        raise ValueError(f"all {len(trials)} trials of the sweep failed: {reasons}")
    return max(finished, key=lambda row: (row["metrics"]["best_auc"], -row["metrics"]["best_loss"]))
