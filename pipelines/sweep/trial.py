"""What a trial of a sweep does, in its own process: a world of one under the same engine as every training."""

from __future__ import annotations

import gc
from typing import Any

from pipelines.cluster.board import hear_outages, post
from pipelines.override import override
from pipelines.placement import Placement
from pipelines.sweep.ledger import checkpoint_folder, trial_name
from pipelines.tracking.outbox import Outbox
from pipelines.worker.config import TrainStepConfig


def trial(chosen: dict[str, Any], payload: dict[str, Any]) -> None:
    """What Ray Tune runs for each trial. `chosen` is what `Search.suggest` returned.

    It resumes from its own newest checkpoint. Epochs that the driver's ledger has are not reported again.
    """
    from pipelines.worker.checkpoint.stored import Checkpoints
    from pipelines.worker.launch import RayReporter, train_on_dataset, world_of_one

    gc.collect()  # the actor may have run a trial before, whose engine refers to itself
    config = override(TrainStepConfig.model_validate(payload["config"]), chosen["overrides"])
    placement = Placement.model_validate(payload["placement"])
    name = trial_name(chosen["number"], payload["trials"])
    board, tracking = payload["board"], payload["tracking"]
    # The driver has made the run. Its id is asked for with the first epoch: importing MLflow takes seconds.
    outbox = Outbox(
        tracking,
        lambda: tracking.find_trial(payload["parent"], chosen["id"], chosen["overrides"], name=name),
        begin=lambda what: post(board, name, {"begin": what}),
    )

    def send(metrics: dict[str, float]) -> None:
        outbox.settle()  # where ASHA ends the trial, its process may be gone a moment later
        _report(metrics, recorded=chosen["recorded"])

    def reporter(rank: int) -> RayReporter:
        return RayReporter(send, rank, board=board, name=name)

    world_of_one(placement.backend)
    checkpoints = Checkpoints(checkpoint_folder(payload["out"], chosen["id"]))
    begun = checkpoints.newest_state()
    control = _control(placement)
    with control, hear_outages(board, name), outbox:
        if begun:
            outbox.resume(begun["history"], begun.get("unsent", ()))
            # A driver that was killed may not have heard of the last epochs. ASHA decides about them before another one
            # is made.
            for epoch, metrics in enumerate(begun["history"], 1):
                send({**metrics, "epoch": epoch})
        train_on_dataset(
            config,
            placement,
            payload["dataset"],
            reporter,
            checkpoints,
            journal=outbox,
            init=payload["init"],
            control=control,
        )


def _control(placement: Placement) -> Any:
    """What tells a trial when to write a checkpoint. Nobody asks it for anything else, so it needs no board."""
    from pipelines.worker.group.control import Control, OwnFlags

    every_s = placement.checkpoint_minutes * 60
    return Control(0, OwnFlags(), checkpoint_s=every_s, checkpoint_steps=placement.checkpoint_steps)


def _report(metrics: dict[str, float], *, recorded: int) -> None:
    """Hands Tune an epoch, unless it is among those `recorded`. Where ASHA ends the trial this does not return."""
    import ray.tune

    if metrics["epoch"] > recorded:
        ray.tune.report({"epoch": metrics["epoch"], "val_auc": metrics["val_auc"], "reported": metrics})
