"""Runs one trial of a sweep in its own process, with the same engine as every training."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipelines.override import override
from pipelines.sweep.ledger import checkpoint_folder, trial_name
from pipelines.tracking import Tracking
from pipelines.tracking.outbox import Outbox
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.job import TrainJob, run_job

if TYPE_CHECKING:
    from pipelines.placement import Placement
    from pipelines.worker.group.control import Control


@dataclass(frozen=True, kw_only=True)
class TrialJob(TrainJob):
    """The job shared by all trials of a sweep: `config` is the recipe's, `out` is the sweep's folder."""

    tracking: Tracking
    parent: str
    """The sweep's MLflow run."""
    trials: int

    def chosen(self, number: int, trial_id: str, overrides: dict[str, Any]) -> TrialJob:
        """The job of one trial."""
        return replace(
            self,
            name=trial_name(number, self.trials),
            config=override(self.config, overrides),
            out=checkpoint_folder(self.out, trial_id),
        )


def trial(chosen: dict[str, Any], sweep: TrialJob) -> None:
    """The function that Ray Tune runs for each trial; `chosen` is the result of `Search.suggest`.

    The trial resumes from its newest checkpoint. Epochs already in the driver's ledger are not reported again.
    """
    from pipelines.worker.launch import world_of_one

    gc.collect()  # frees the engine of an earlier trial in this actor, which has reference cycles
    job = sweep.chosen(chosen["number"], chosen["id"], chosen["overrides"])
    # The run is looked up with the first epoch, because importing MLflow takes seconds.
    outbox = Outbox(
        job.tracking,
        lambda: job.tracking.find_trial(job.parent, chosen["id"], chosen["overrides"], name=job.name),
        begin=lambda what: job.post(begin=what),
    )

    def send(metrics: dict[str, float]) -> None:
        outbox.settle()  # if ASHA stops the trial, its process may end right after the report
        _report(metrics, recorded=chosen["recorded"])

    def begin() -> None:
        """Reports epochs that a killed driver may have missed, so that ASHA decides on them before the next epoch."""
        if begun := Checkpoints(job.out).newest_state():
            outbox.resume(begun["history"], begun.get("unsent", ()))
            for epoch, metrics in enumerate(begun["history"], 1):
                send({**metrics, "epoch": epoch})

    world_of_one(job.placement.backend)
    run_job(job, outbox, _control(job.placement), send=send, begin=begin)


def _control(placement: Placement) -> Control:
    """The control that schedules a trial's checkpoints. It takes no requests, so it has no board."""
    from pipelines.worker.group.control import Control, OwnFlags

    every_s = placement.checkpoint_minutes * 60
    return Control(0, OwnFlags(), checkpoint_s=every_s, checkpoint_steps=placement.checkpoint_steps)


def _report(metrics: dict[str, float], *, recorded: int) -> None:
    """Reports an epoch to Tune unless it is already `recorded`. Does not return if ASHA stops the trial."""
    import ray.tune

    if metrics["epoch"] > recorded:
        ray.tune.report({"epoch": metrics["epoch"], "val_auc": metrics["val_auc"], "reported": metrics})
