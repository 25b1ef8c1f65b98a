"""Shards -> the weights of the best epoch, under Ray Train with DeepSpeed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_shards.manifest import open_dataset
from data_shards.store import Store, StoreKeyError, arrow_filesystem
from pipelines import ray_internals
from pipelines.board import Watch, hear_outages, post
from pipelines.costs import cost_facts, cost_line, read_prices
from pipelines.faults import users_mistake
from pipelines.flow import StepContext
from pipelines.initial_weights import begin_from, kept_uri
from pipelines.outbox import Outbox
from pipelines.override import flatten, override
from pipelines.placement import Placement
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.state import BEST, ResumeError, check_resumable, read_described
from pipelines.worker.usage import read_usage

RAY_RUN = "ray"
PROFILE = "profile/profile.json"
TRACE = "profile/trace.json.gz"
SLOW = "medmamba.slow"  # tag of a run that is far below what its network benches at: why
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
        origin = begin_from(resolved, shard, context)
        context.tracking.log_params(run_id, {"init": origin})
        prices = read_prices(placement.prices)
        _check_resume(out, placement, shard["digest"], context)
        payload = {
            "config": resolved.model_dump(),
            "placement": placement.model_dump(),
            "dataset": (context.store.at(shard["data"]), shard["digest"]),
            "init": kept_uri(resolved, context.store),
            "run_id": run_id,
            "tracking": context.tracking,
            "profile_into": out if context.profile else None,
        }
        out.delete(PROFILE)  # of an earlier process, which was interrupted
        checkpoint = _fit(payload, placement, out, context)
        with checkpoint.as_directory() as folder:
            facts = keep_best(Path(folder), out, context.run, shard["max_side"], origin=origin)
            usage = read_usage(Path(folder))
        costs = cost_facts(usage, prices)
        context.tracking.log_metrics(run_id, costs, step=facts["epochs"])
        context.show.say(cost_line(usage, facts["epochs"], prices))
    measured = {"usage": {**costs, "gpus": {**usage.gpu_s}}, **_profiled(out, context)}
    return {**facts, **measured, "mlflow_run": run_id, "resolved": resolved.model_dump(mode="json")}


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
    import torch

    from pipelines.worker.launch import RayReporter, resume_outbox, train_on_dataset
    from pipelines.worker.speed_check import speed_check

    checkpoint = ray.train.get_checkpoint()
    config = TrainStepConfig.model_validate(payload["config"])
    placement = Placement.model_validate(payload["placement"])
    board = payload["board"]
    outbox = Outbox(payload["tracking"], payload["run_id"], begin=lambda what: post(board, "train", {"begin": what}))

    def reporter(rank: int) -> RayReporter:
        if rank > 0:
            return RayReporter(ray.train.report, rank)
        gpu = torch.cuda.get_device_name() if placement.device == "cuda" else ""
        judge = tagging(speed_check(config, placement, gpu), outbox)
        return RayReporter(ray.train.report, rank, board=board, name="train", outbox=outbox, judge=judge)

    found = checkpoint.as_directory() if checkpoint else contextlib.nullcontext()
    with hear_outages(board, "train"), outbox, found as folder:
        if folder and ray.train.get_context().get_world_rank() == 0:
            resume_outbox(outbox, Path(folder))
        train_on_dataset(
            config,
            placement,
            payload["dataset"],
            reporter,
            resume=Path(folder) if folder else None,
            init=payload["init"],
            keep_profile=functools.partial(keep_profile, payload["profile_into"]) if payload["profile_into"] else None,
        )


def keep_profile(out: Store, summary: dict[str, Any], trace: Path) -> None:
    """Stores a profile, from the worker, in the step's folder; the summary last."""
    out.put(TRACE, trace.read_bytes())
    out.put(PROFILE, json.dumps(summary, indent=2).encode())


def tagging(check: Callable[[dict[str, float]], str], outbox: Outbox) -> Callable[[dict[str, float]], str]:
    """A speed check of which a warning becomes a tag of the run too."""

    def judge(metrics: dict[str, float]) -> str:
        warning = check(metrics)
        if warning:
            outbox.tags({SLOW: warning})
        return warning

    return judge


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
    if os.environ.get("RAY_ADDRESS") or not ray_internals.are_known():
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        return DataParallelTrainer
    from pipelines.worker.trainer import LocalTrainer

    return LocalTrainer


def keep_best(
    folder: Path, out: Store, run: str, max_side: int | None, *, origin: Mapping[str, str] = MappingProxyType({})
) -> dict:
    """Copies the best epoch's model to `out/model`; returns the training's facts.

    The card learns of `max_side`, so that a prediction shrinks an image as the shards did, and of the `origin` of the
    weights that the training started from. `folder` may be the stored checkpoint itself, whose digests are on record:
    nothing is written into it.
    """
    described = json.loads((folder / BEST / "model.json").read_text())
    described["card"]["max_side"] = max_side
    if origin:
        described["card"]["init"] = {key: origin[key] for key in ("uri", "digest")}
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
        "compile": state.get("compile", "off"),
        "best_epoch": state["best_epoch"],
        "epochs": state["epoch"],
        "metrics": state["best"],
        "history": state["history"],
        **({"init": dict(origin)} if origin else {}),
    }


def _profiled(out: Store, context: StepContext) -> dict[str, Any]:
    """The profile that a worker has stored, as a fact; nothing where none was asked for."""
    if not context.profile:
        return {}
    if out.head(PROFILE) is None:
        context.show.say("nothing was profiled: no epoch was left to train")
        return {}
    return {"profile": {**json.loads(out.get(PROFILE)), "trace": f"{out.uri}/{TRACE}"}}


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
