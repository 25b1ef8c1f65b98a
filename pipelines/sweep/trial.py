"""What a trial of a sweep does, in its own process: a world of one under the same engine as every training."""

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
    """What all trials of a sweep have in common: `config` is the recipe's, `out` is the sweep's."""

    tracking: Tracking
    parent: str
    """The sweep's run in MLflow."""
    trials: int

    def chosen(self, number: int, trial_id: str, overrides: dict[str, Any]) -> TrialJob:
        """That of one trial."""
        return replace(
            self,
            name=trial_name(number, self.trials),
            config=override(self.config, overrides),
            out=checkpoint_folder(self.out, trial_id),
        )


def trial(chosen: dict[str, Any], sweep: TrialJob) -> None:
    """What Ray Tune runs for each trial. `chosen` is what `Search.suggest` returned.

    It resumes from its own newest checkpoint. Epochs that the driver's ledger has are not reported again.
    """
    from pipelines.worker.launch import world_of_one

    gc.collect()  # the actor may have run a trial before, whose engine refers to itself
    job = sweep.chosen(chosen["number"], chosen["id"], chosen["overrides"])
    # The driver has made the run. Its id is asked for with the first epoch: importing MLflow takes seconds.
    outbox = Outbox(
        job.tracking,
        lambda: job.tracking.find_trial(job.parent, chosen["id"], chosen["overrides"], name=job.name),
        begin=lambda what: job.post(begin=what),
    )

    def send(metrics: dict[str, float]) -> None:
        outbox.settle()  # where ASHA ends the trial, its process may be gone a moment later
        _report(metrics, recorded=chosen["recorded"])

    def begin() -> None:
        """A driver that was killed may not have heard of the last epochs: ASHA decides about them before another one is
        made."""
        if begun := Checkpoints(job.out).newest_state():
            outbox.resume(begun["history"], begun.get("unsent", ()))
            for epoch, metrics in enumerate(begun["history"], 1):
                send({**metrics, "epoch": epoch})

    world_of_one(job.placement.backend)
    run_job(job, outbox, _control(job.placement), send=send, begin=begin)


def _control(placement: Placement) -> Control:
    """What tells a trial when to write a checkpoint. Nobody asks it for anything else, so it needs no board."""
    from pipelines.worker.group.control import Control, OwnFlags

    every_s = placement.checkpoint_minutes * 60
    return Control(0, OwnFlags(), checkpoint_s=every_s, checkpoint_steps=placement.checkpoint_steps)


def _report(metrics: dict[str, float], *, recorded: int) -> None:
    """Hands Tune an epoch, unless it is among those `recorded`. Where ASHA ends the trial this does not return."""
    import ray.tune

    if metrics["epoch"] > recorded:
        ray.tune.report({"epoch": metrics["epoch"], "val_auc": metrics["val_auc"], "reported": metrics})
