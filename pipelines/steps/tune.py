"""A sweep over the training's hyperparameters: Ray Tune with Optuna and ASHA; its winner is a dict of overrides."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_shards.store import Store
from data_shards.store.fenced_lease import fenced_check, is_lost
from pipelines.cluster.board import Watch
from pipelines.faults import RESUME
from pipelines.initial_weights import begin_from, kept_uri
from pipelines.override import override
from pipelines.placement import Placement
from pipelines.steps.context import StepContext
from pipelines.steps.search import TuneStepConfig, chooser, search_space
from pipelines.steps.train import check_batches
from pipelines.sweep.ledger import Ledger, TrialRecord
from pipelines.sweep.pickled import drop_pickled
from pipelines.sweep.suggestion import misfit
from pipelines.sweep.trial import TrialJob, trial
from pipelines.tracking import Tracking, TrackingError
from pipelines.tracking.outbox import Outbox
from pipelines.wording import counted
from pipelines.worker.state import rank


def run(config: TuneStepConfig, placement: Placement, out: Store, context: StepContext, *, shard: dict) -> dict:
    """Runs or resumes the sweep; returns the winner, a dict of dotted overrides, and a row per trial.

    The winner has the highest validation AUC of any epoch, ties broken by validation loss.
    Raises ValueError if every trial failed, if one failed for a reason other than divergence, or if the sweep ended
    before its last trial; the step is then not finished, and running it again resumes it.
    """
    tracking = context.tracking
    params = {"trials": config.tune.trials, "epochs": config.tune.epochs, **config.tune.space.model_dump()}
    with tracking.running(out, run=context.run, step="tune", check=context.check, params=params) as parent:
        config.start.with_classes(len(shard["counts"]["train"]))  # else every trial would fail on it
        check_batches(config.tune.space.batch_size or (config.start.train.batch_size,), shard, context)
        tracking.log_params(parent, {"init": begin_from(config.start, shard, context)})
        job = TrialJob(
            name="tune",
            placement=placement.for_trial(),
            dataset=(context.store.at(shard["data"]), shard["digest"]),
            config=override(config.start, {"train.epochs": config.tune.epochs}),
            out=out,
            init=kept_uri(config.start, context.store),
            check=fenced_check(context.check),
            tracking=tracking,
            parent=parent,
            trials=config.tune.trials,
        )
        try:
            ledger, errors = _sweep(config, job, placement.concurrent_trials, context)
            runs = {record.number: _end_run(tracking, parent, record) for record in ledger.records()}
            trials = [{**_row(record, config), "mlflow_run": runs[record.number]} for record in ledger.records()]
            tracking.drop_trials(parent, [row["trial"] for row in trials])
        except BaseException:  # including Ctrl-C
            # The error that ended the sweep must be reported, not one of MLflow.
            quick = tracking.impatient
            with contextlib.suppress(TrackingError):
                if not is_lost(context.check):  # else the trials belong to the driver that took over
                    quick.finish(
                        parent, "KILLED"
                    )  # first: a trial that begins its run after this ends it, see find_trial
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


def _sweep(
    config: TuneStepConfig, job: TrialJob, at_once: int, context: StepContext
) -> tuple[Ledger, dict[int, BaseException]]:
    """Runs the rest of the sweep; returns its ledger, and the errors of the trials that failed now."""
    tune, space, out = config.tune, search_space(config), job.out
    ledger = Ledger(out, check=context.check)
    ledger.read(functools.partial(misfit, space=space, trials=tune.trials, epochs=tune.epochs), context.show.say)
    drop_pickled(out, ledger, context.show.say)
    numbers = ledger.to_do(tune.trials)
    if ledger.records():
        context.show.say(_resumed(ledger, tune.trials))
    if not numbers:
        return ledger, {}
    from pipelines.sweep.seams import Asha, Keeper, Search, run_trials

    job.tracking.reopen_trials(job.parent)
    search = Search(ledger, numbers, chooser(config, space, ledger, context.show.say))
    keeper = Keeper(ledger, job.tracking, job.parent, trials=tune.trials, epochs=tune.epochs)
    asha = Asha(tune.epochs, tune.grace_epochs, tune.reduction_factor)
    asha.refill(ledger)
    at_once = min(at_once, len(numbers))
    with Watch(context.show.progress) as board:
        begun = f"starting {counted(len(numbers), 'trial')}, {at_once} at once"
        context.show.begin(begun)  # until the first step of one
        trainable = _trainable(replace(job, board=board))
        run_trials(trainable, search, asha, keeper, trials=len(numbers), at_once=at_once)
    if left := set(ledger.to_do(tune.trials)) - keeper.errors.keys():
        raise ValueError(f"the sweep ended with {len(left)} of {tune.trials} trials left; {RESUME}")
    return ledger, keeper.errors


def _trainable(job: TrialJob) -> Any:
    """The function that Tune runs for each trial, with a trial's resources."""
    from ray import tune

    placement = job.placement
    resources = {"CPU": placement.cpus_per_worker} | ({"GPU": 1} if placement.device == "cuda" else {})
    return tune.with_resources(functools.partial(trial, sweep=job), resources)


def _resumed(ledger: Ledger, trials: int) -> str:
    """The message about a sweep that resumes."""
    over, epochs = len(ledger.over()), sum(len(record.epochs) for record in ledger.records())
    kept = f"{counted(epochs, 'epoch')} {'is' if epochs == 1 else 'are'} kept"
    return f"the sweep resumes where it was interrupted: {over} of {trials} trials are finished, {kept}"


def complete_run(tracking: Tracking, run_id: str, record: TrialRecord) -> None:
    """Logs the epochs that a trial's MLflow run lacks: one that was stopped or killed may not have sent the last."""
    with Outbox(tracking, run_id) as outbox:
        outbox.resume({"step": 0, **each.metrics, "epoch": epoch} for epoch, each in enumerate(record.epochs, 1))


def _end_run(tracking: Tracking, parent: str, record: TrialRecord) -> str:
    """Completes and ends a trial's run in MLflow; returns its id."""
    run_id = tracking.trial_run(parent, record.id)
    complete_run(tracking, run_id, record)
    tracking.finish(run_id, "FAILED" if record.reason else "FINISHED")
    return run_id


def _check_reasons(ledger: Ledger, errors: Mapping[int, BaseException]) -> None:
    """Raises ValueError if a trial failed for a reason other than its hyperparameters, because a retry may succeed."""
    failed = [record for record in ledger.records() if record.state == "failed"]
    if failed:
        line = failed[0].reason.removesuffix(f": {RESUME}").removesuffix(f", then {RESUME}")
        raise ValueError(
            f"{len(failed)} of {len(ledger.records())} trials failed for reasons other than divergence "
            f"({line}); fix the cause and run the same command to try them again"
        ) from errors.get(failed[0].number)


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
        which = "the only trial" if len(trials) == 1 else f"all {len(trials)} trials"
        raise ValueError(f"{which} of the sweep failed: {reasons}")
    return max(finished, key=lambda row: rank(row["metrics"], "best_"))
