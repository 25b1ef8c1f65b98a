"""Shards -> the weights of the best epoch, under Ray Train with DeepSpeed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_shards.manifest import open_dataset
from data_shards.store import Store, StoreKeyError, arrow_filesystem
from pipelines.board import Watch
from pipelines.faults import users_mistake
from pipelines.flow import StepContext
from pipelines.override import flatten, override
from pipelines.placement import Placement
from pipelines.tracking import Tracking
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.state import BEST, ResumeError, check_resumable, read_described

RAY_RUN = "ray"
SNAPSHOT = f"{RAY_RUN}/checkpoint_manager_snapshot.json"  # Ray Train's own list of the checkpoints that are whole


def run(
    config: TrainStepConfig,
    placement: Placement,
    out: Store,
    context: StepContext,
    *,
    shard: dict,
    tune: dict | None = None,
) -> dict:
    """Trains with the recipe, or with a sweep's winner over it, and keeps the best epoch's model under `out/model`.

    Raises ValueError where the placement does not divide the batch, the training split does not fill one, the model
    has not one output per class, or a checkpoint cannot be continued exactly.
    """
    resolved = override(config, tune["winner"]) if tune else config
    params = flatten(resolved.model_dump())
    # What is refused is FAILED in MLflow too.
    with context.tracking.running(out, run=context.run, step="train", check=context.check, params=params) as run_id:
        resolved.train.accumulation(placement.workers)  # what is impossible fails here, before a worker starts
        resolved.with_classes(len(shard["counts"]["train"]))
        check_batches([resolved.train.batch_size], shard, context)
        _check_resume(out, placement, shard["digest"], context)
        payload = {
            "config": resolved.model_dump(),
            "placement": placement.model_dump(),
            "dataset": (context.store.at(shard["data"]).uri, shard["digest"]),
            "run_id": run_id,
            "tracking": context.tracking,
        }
        checkpoint = _fit(payload, placement, out, context)
        with checkpoint.as_directory() as folder:
            facts = keep_best(Path(folder), out, context.run, shard["max_side"])
    return {**facts, "mlflow_run": run_id, "resolved": resolved.model_dump(mode="json")}


def check_batches(sizes: Sequence[int], shard: dict, context: StepContext) -> None:
    """Raises ValueError where the training split does not fill a batch of one of the sizes: nothing to train on."""
    data = open_dataset(context.store.at(shard["data"]), digest=shard["digest"])
    held = data.manifest.splits["train"].samples
    if max(sizes) > held:
        raise ValueError(
            f"train.batch_size {max(sizes)}: the training split holds {held} images, and an incomplete batch is "
            f"dropped; use batches of at most {held}"
        )


def ray_worker(payload: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    import ray.train

    from pipelines.worker.launch import RayReporter, train_on_dataset

    checkpoint = ray.train.get_checkpoint()

    def reporter(rank: int) -> RayReporter:
        log = log_new_epochs(payload["tracking"], payload["run_id"]) if rank == 0 else None
        return RayReporter(ray.train.report, rank, board=payload["board"], name="train", log=log)

    with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as folder:
        train_on_dataset(
            TrainStepConfig.model_validate(payload["config"]),
            Placement.model_validate(payload["placement"]),
            payload["dataset"],
            reporter,
            resume=Path(folder) if folder else None,
        )


def log_new_epochs(tracking: Tracking, run_id: str) -> Callable[[dict[str, float], list[float]], None]:
    """`tracking.log_epoch` of a run, for the epochs that the run does not have yet.

    An epoch that was logged but whose checkpoint was lost with a killed driver is trained again, to the same numbers.
    """

    @functools.cache  # asked at the end of an epoch: the first step need not wait until MLflow is imported
    def last_logged() -> int:
        with tracking.errors("cannot read metrics"):
            return max((point.step for point in tracking.client.get_metric_history(run_id, "train_loss")), default=0)

    def log(metrics: dict[str, float], step_losses: list[float]) -> None:
        if metrics["epoch"] > last_logged():
            tracking.log_epoch(run_id, metrics, step_losses)

    return log


def _fit(payload: dict, placement: Placement, out: Store, context: StepContext):
    import ray.train

    from pipelines.worker.process_group import GroupConfig

    filesystem, path = arrow_filesystem(out)
    resources = {"CPU": placement.cpus_per_worker} | ({"GPU": 1} if placement.device == "cuda" else {})
    with Watch(context.show.progress) as board:
        trainer = _trainer_class()(
            ray_worker,
            train_loop_config={**payload, "board": board},
            backend_config=GroupConfig(placement.backend),
            scaling_config=ray.train.ScalingConfig(
                num_workers=placement.workers, use_gpu=placement.device == "cuda", resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=RAY_RUN,
                storage_path=path,
                storage_filesystem=filesystem,
                # The best epoch's weights travel inside every checkpoint, so the newest one is enough.
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
                # On one machine a crash is nearly always an error that comes again; nodes of a cluster do get lost.
                failure_config=ray.train.FailureConfig(max_failures=2 if placement.nodes > 1 else 0),
            ),
        )
        workers = f"{placement.workers} training worker{'s' if placement.workers > 1 else ''}"
        context.show.begin(f"starting {workers}")  # until their first step
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise users_mistake(error) or error from None
    assert result.checkpoint is not None, "the training ended without a checkpoint"
    return result.checkpoint


def _trainer_class() -> Any:
    if os.environ.get("RAY_ADDRESS"):
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        return DataParallelTrainer
    from pipelines.worker.trainer import LocalTrainer

    return LocalTrainer


def keep_best(folder: Path, out: Store, run: str, max_side: int | None) -> dict:
    """Copies the best epoch's model to `out/model`; returns the training's facts.

    The card learns of `max_side`, so that a prediction shrinks an image as the shards did. `folder` may be the stored
    checkpoint itself, whose digests are on record: nothing is written into it.
    """
    described = json.loads((folder / BEST / "model.json").read_text())
    described["card"]["max_side"] = max_side
    files = {
        "weights.safetensors": (folder / BEST / "weights.safetensors").read_bytes(),
        "model.json": json.dumps(described, indent=2, sort_keys=True).encode(),
    }
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(data)
        out.put(f"model/{name}", data)
    state = read_described((folder / "train.json").read_bytes())
    return {
        "digest": digest.hexdigest(),
        "model": f"runs/{run}/train/model",
        "best_epoch": state["best_epoch"],
        "epochs": state["epoch"],
        "metrics": state["best"],
        "history": state["history"],
    }


def find_checkpoint(out: Store) -> dict[str, Any] | None:
    """The train.json of the checkpoint that Ray Train will resume from; None where it will begin at the beginning.

    Only what Ray's snapshot names counts: a kill in the middle of an upload leaves a folder of which files are missing.
    """
    try:
        newest = json.loads(out.get(SNAPSHOT))["latest_checkpoint_result"]
        if not newest:
            return None
        data = out.get(f"{RAY_RUN}/{newest['checkpoint_dir_name']}/train.json")
        return read_described(data, remedy=_begin_again(out))
    except StoreKeyError as error:
        if out.head(SNAPSHOT) is None:
            return None
        raise ResumeError(f"{error}, which {SNAPSHOT} names: {_begin_again(out)}") from error
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResumeError(
            f"{out.uri}/{SNAPSHOT} or the checkpoint it names is torn ({error}): {_begin_again(out)}"
        ) from error


def _begin_again(out: Store) -> str:
    return f"delete {out.uri}/{RAY_RUN} to train from the beginning, or use another --run NAME"


def _check_resume(out: Store, placement: Placement, manifest: str, context: StepContext) -> None:
    """Says that a training resumes, and refuses one that could not do so exactly, before any worker starts."""
    described = find_checkpoint(out)
    if described:
        check_resumable(described, placement=placement, manifest=manifest)
        context.show.say(f"training resumes after epoch {described['epoch']}")
