"""A sweep over the training's hyperparameters: Ray Tune with Optuna and ASHA; its winner is a dict of overrides."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_shards.fenced_lease import is_lost
from data_shards.store import Store, arrow_filesystem
from pipelines.board import Watch, hear_outages, post
from pipelines.faults import RESUME, fault_line
from pipelines.flow import StepContext
from pipelines.initial_weights import begin_from, kept_uri
from pipelines.outbox import Outbox
from pipelines.override import flatten, override
from pipelines.placement import Placement
from pipelines.steps.train import check_batches
from pipelines.tracking import Tracking, TrackingError
from pipelines.worker.checkpoints import Checkpoints
from pipelines.worker.config import TrainStepConfig

RAY_RUN = "ray"


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
    """ASHA lets one in this many trials go on at each rung."""
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
            "config": config.model_dump(),
            "placement": placement.for_trial().model_dump(),
            "dataset": (context.store.at(shard["data"]), shard["digest"]),
            "init": kept_uri(config.start, context.store),
            "parent": parent,
            "tracking": tracking,
            "out": out,
        }
        try:
            results = _fit(config, payload, placement, out, context)
            trials = [_row(result, config) for result in results]
            for row in trials:
                row["mlflow_run"] = tracking.trial_run(parent, row["trial"])
                tracking.finish(row["mlflow_run"], "FAILED" if row["error"] else "FINISHED")
            tracking.drop_trials(parent, [row["trial"] for row in trials])
        except BaseException:
            # What ended the sweep is what must be told, not that MLflow could not be told of it.
            quick = tracking.impatient
            with contextlib.suppress(TrackingError):
                if not is_lost(context.check):  # else they are the trials of the driver that took over
                    quick.finish(parent, "KILLED")  # first: a trial that begins its run now ends it, see find_trial
                    quick.close_trials(parent)
            raise
        _check_reasons(results)
        winner = _winner(trials)
        tracking.log_metrics(parent, winner["metrics"], step=winner["epochs"])
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


@dataclass
class BestEpoch:
    """Validation figures of a trial's best epoch so far, by which trials are compared, whatever came after it."""

    auc: float = -1.0
    loss: float = math.inf

    def after(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The figures once an epoch of these `metrics` (val_auc, val_loss) has ended."""
        # A higher AUC; with equal AUC a lower loss.
        if (metrics["val_auc"], -metrics["val_loss"]) > (self.auc, -self.loss):
            self.auc, self.loss = metrics["val_auc"], metrics["val_loss"]
        return {"best_auc": self.auc, "best_loss": self.loss}


def trial(sampled: dict[str, Any], payload: dict[str, Any]) -> None:
    """What Ray Tune runs for each trial, in the trial's own process: a world of one under the same engine."""
    import ray.tune

    from pipelines.worker.launch import RayReporter, train_on_dataset, world_of_one

    step = TuneStepConfig.model_validate(payload["config"])
    config = override(step.start, {**sampled, "train.epochs": step.tune.epochs})
    trial_id = ray.tune.get_context().get_trial_id()
    name = trial_name(_number(ray.tune.get_context().get_trial_dir(), trial_id), step.tune.trials, trial_id)
    best = BestEpoch()
    gc.collect()  # the actor may have run a trial before, whose engine refers to itself

    def send(metrics: dict[str, float]) -> None:
        ray.tune.report({**metrics, **best.after(metrics)})

    board, tracking = payload["board"], payload["tracking"]
    # The driver has made the run. Its id is asked for with the first epoch: importing MLflow takes seconds.
    outbox = Outbox(
        tracking,
        lambda: tracking.find_trial(payload["parent"], trial_id, sampled, name=name),
        begin=lambda what: post(board, name, {"begin": what}),
    )

    def reporter(rank: int) -> RayReporter:
        return RayReporter(send, rank, board=board, name=name)

    placement = Placement.model_validate(payload["placement"])
    world_of_one(placement.backend)
    checkpoints = Checkpoints(payload["out"].at("trials", trial_id))
    begun = checkpoints.newest_state()
    if begun and begun["best"]:
        best.after(begun["best"])
    with hear_outages(board, name), outbox:
        train_on_dataset(
            config, placement, payload["dataset"], reporter, checkpoints, journal=outbox, init=payload["init"]
        )


def begin_runs(tracking: Tracking, parent: str, num_trials: int) -> Any:
    """What Tune calls in the driver before a trial begins: makes its run in MLflow, which the driver has imported."""
    from ray import tune

    class Runs(tune.Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            name = trial_name(_number(trial.path, trial.trial_id), num_trials, trial.trial_id)
            with contextlib.suppress(TrackingError):  # then the trial makes it, which waits for MLflow
                tracking.impatient.trial_run(parent, trial.trial_id, trial.config, name=name)

        # Tune copies its callbacks, and keeps them in the store. The address of MLflow may hold a password, and a
        # sweep that is restored does without: its trials make their runs themselves.
        def __deepcopy__(self, memo: dict) -> Runs:
            return self

        def __reduce__(self) -> tuple:
            return tune.Callback, ()

    return Runs()


def trial_name(number: int, trials: int, trial_id: str) -> str:
    """What users read: "trial 3/8"; its id where Ray does not say which one it is."""
    return f"trial {number}/{trials}" if number else f"trial {trial_id}"


def _number(path: str, trial_id: str) -> int:
    """Which of the sweep's trials, counted from 1, writes to this folder; 0 where its name does not say.

    Tune names the folder once, `trial_<id>_<number>_<values>_<time>`, and keeps it when a sweep is restored.
    """
    found = re.match(rf".*_{re.escape(trial_id)}_(\d+)(_|$)", Path(path).name)
    return int(found.group(1)) if found else 0


def search_space(config: TuneStepConfig) -> dict[str, Any]:
    """Dotted key of the recipe -> the distribution Ray Tune draws it from."""
    from ray import tune

    space = config.tune.space
    drawn: dict[str, Any] = {
        key: tune.uniform(*bounds) if key == "model.drop_path" else tune.loguniform(*bounds)
        for key, bounds in space.bounds(config.start).items()
    }
    return drawn | ({"train.batch_size": tune.choice(list(space.batch_size))} if space.batch_size else {})


def _fit(config: TuneStepConfig, payload: dict, placement: Placement, out: Store, context: StepContext):
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    filesystem, path = arrow_filesystem(out)
    for_trial = placement.for_trial()
    resources = {"CPU": for_trial.cpus_per_worker} | ({"GPU": 1} if placement.device == "cuda" else {})
    with Watch(context.show.progress) as board:
        trainable = tune.with_resources(functools.partial(trial, payload={**payload, "board": board}), resources)
        if _restorable(out):
            context.show.say("the sweep resumes where it was interrupted")
            payload["tracking"].reopen_trials(payload["parent"])
            tuner = tune.Tuner.restore(
                f"{path}/{RAY_RUN}",
                trainable,
                storage_filesystem=filesystem,
                resume_unfinished=True,
                # Under their own ids: a restarted trial would get a new one, which Optuna does not know (KeyError).
                resume_errored=True,
            )
        else:
            for key in list(out.list(f"{RAY_RUN}/")):
                out.delete(key)
            space = search_space(config)
            tuner = tune.Tuner(
                trainable,
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric="val_auc",
                    mode="max",
                    num_samples=config.tune.trials,
                    max_concurrent_trials=placement.trials,
                    reuse_actors=True,  # a process needs 6 s to import torch and DeepSpeed
                    search_alg=OptunaSearch(
                        seed=config.tune.seed, points_to_evaluate=_recipe_point(config, space, context)
                    ),
                    # Tune's own training_iteration starts again after a restore; the loop's epoch does not.
                    scheduler=ASHAScheduler(
                        time_attr="epoch",
                        max_t=config.tune.epochs,
                        grace_period=min(config.tune.grace_epochs, config.tune.epochs),
                        reduction_factor=config.tune.reduction_factor,
                    ),
                ),
                run_config=tune.RunConfig(
                    name=RAY_RUN,
                    storage_path=path,
                    storage_filesystem=filesystem,
                    verbose=0,
                    callbacks=[begin_runs(payload["tracking"], payload["parent"], config.tune.trials)],
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                ),
            )
        at_once = min(placement.trials, config.tune.trials)
        context.show.begin(f"starting {config.tune.trials} trials, {at_once} at once")  # until the first step of one
        # Tune draws its own tables on standard output, which holds our results.
        with contextlib.redirect_stdout(io.StringIO()):
            results = tuner.fit()
    _check_ended(results, config)
    return results


def _restorable(out: Store) -> bool:
    """Whether Tune can go on from what lies in `out`; a state that a kill left half-written is removed.

    `Tuner.can_restore` looks for tuner.pkl alone, which is there before the first state is.
    """
    for key in sorted(out.list(f"{RAY_RUN}/experiment_state-"), reverse=True):
        try:
            if json.loads(out.get(key))["trial_data"]:
                return out.head(f"{RAY_RUN}/tuner.pkl") is not None
        except json.JSONDecodeError:
            out.delete(key)
    return False


def _check_ended(results: Any, config: TuneStepConfig) -> None:
    ended = results.num_terminated + results.num_errors
    if ended < config.tune.trials:
        raise ValueError(f"the sweep was ended after {ended} of {config.tune.trials} trials; {RESUME}")


def _check_reasons(results: Any) -> None:
    """Raises ValueError where a trial failed for another reason than its hyperparameters: that may pass."""
    if not results.errors:
        return
    from pipelines.worker.loop import TrainingError

    reasons = [error for error in results.errors if not isinstance(getattr(error, "cause", error), TrainingError)]
    if reasons:
        line = fault_line(reasons[0], step="tune").removesuffix(f": {RESUME}").removesuffix(f", then {RESUME}")
        raise ValueError(
            f"{len(reasons)} of {len(results)} trials failed for reasons other than divergence "
            f"({line}); fix the cause and run the same command to try them again"
        ) from reasons[0]


def _recipe_point(config: TuneStepConfig, space: dict[str, Any], context: StepContext) -> list[dict[str, Any]]:
    """The recipe's own values as the first trial, where they lie in the space: a sweep never does worse than it.

    Says aloud where they do not.
    """
    own = flatten(config.start.model_dump())
    point = {key: own[key] for key in space}
    for key, value in point.items():
        distribution = space[key]
        inside = (
            value in distribution.categories
            if hasattr(distribution, "categories")
            else distribution.lower <= value <= distribution.upper
        )
        if not inside:
            context.show.say(f"the recipe is no trial of its sweep: its {key} {value:g} lies outside tune.space")
            return []
    return [point]


def _row(result: Any, config: TuneStepConfig) -> dict:
    metrics = result.metrics or {}
    kept = {
        key: metrics[key] for key in ("val_auc", "val_loss", "val_accuracy", "best_auc", "best_loss") if key in metrics
    }
    trial_id = _trial_id(result)
    return {
        "trial": trial_id,
        "number": _number(result.path, trial_id),
        "overrides": dict(result.config),
        "epochs": int(metrics.get("epoch", 0)),
        "metrics": kept,
        "stopped_early": int(metrics.get("epoch", 0)) < config.tune.epochs,
        "error": fault_line(result.error, step="tune") if result.error else None,
    }


def _trial_id(result: Any) -> str:
    """The id of a result's trial; of one that reported nothing it is read from its folder `trial_<id>_<number>_...`."""
    found = re.match(r"trial_([0-9a-f]+(?:_\d{5})?)_\d+_", Path(result.path).name)
    return (result.metrics or {}).get("trial_id") or (found.group(1) if found else Path(result.path).name)


def _winner(trials: list[dict]) -> dict:
    finished = [row for row in trials if not row["error"] and "best_auc" in row["metrics"]]
    if not finished:
        reasons = "; ".join(sorted({str(row["error"]) for row in trials}))
        raise ValueError(f"all {len(trials)} trials of the sweep failed: {reasons}")
    return max(finished, key=lambda row: (row["metrics"]["best_auc"], -row["metrics"]["best_loss"]))
