"""Shards -> the weights of the best epoch, under Ray Train with DeepSpeed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_shards.manifest import open_dataset
from data_shards.store import Store
from data_shards.store.fenced_lease import fenced_check
from medmamba.config import MODEL, WEIGHTS
from pipelines.cluster import ray_internals
from pipelines.cluster.board import Watch
from pipelines.cluster.monitor import RESTARTING, SLOW_S, Limits
from pipelines.cluster.stops import Stops
from pipelines.costs import cost_facts, cost_line, read_prices
from pipelines.faults import RESUME, unwrapped
from pipelines.initial_weights import begin_from, kept_uri
from pipelines.override import flatten, override
from pipelines.placement import Placement
from pipelines.scratch import scratch
from pipelines.steps.context import StepContext
from pipelines.tracking import Tracking
from pipelines.tracking.outbox import Outbox
from pipelines.wording import counted
from pipelines.worker.checkpoint.resume import find_resume
from pipelines.worker.checkpoint.stored import Checkpoints, Found
from pipelines.worker.checkpoint.usage import USAGE, read_usage
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.engine.first_format import find_old_checkpoint
from pipelines.worker.group.control import Control, OwnFlags, SharedFlags, Stopped
from pipelines.worker.group.stop_flag import wants_to_stop
from pipelines.worker.job import TrainJob, run_job
from pipelines.worker.state import ResumeError, state_of, training_digest

PROFILE = "profile/profile.json"
TRACE = "profile/trace.json.gz"
PATIENCE_MARGIN_S = 60.0  # a rank that waits for the store reports itself when its patience is over
SLOW = "medmamba.slow"  # tag of a run that is much slower than its network's benchmark: the reason


@dataclass(frozen=True, kw_only=True)
class LoggedJob(TrainJob):
    """The training of a run."""

    tracking: Tracking
    run_id: str
    """Its run in MLflow."""
    profile: bool
    """Whether a few steps are profiled."""


def run(
    config: TrainStepConfig,
    placement: Placement,
    out: Store,
    context: StepContext,
    *,
    shard: dict,
    tune: dict | None = None,
) -> dict:
    """Trains with the recipe and the overrides of the sweep's winner; stores the best epoch's model in `out/model`.

    Raises ValueError if the placement does not divide the batch, the training split does not fill one, the model does
    not have one output per class, or a checkpoint cannot be resumed exactly.
    """
    resolved = override(config, tune["winner"]) if tune else config
    params = flatten(resolved.model_dump())
    # Inside the block, so that a rejected training is FAILED in MLflow too.
    with context.tracking.running(out, run=context.run, step="train", check=context.check, params=params) as run_id:
        resolved.train.accumulation(placement.workers)  # an impossible size fails here, before a worker starts
        complete = resolved.with_classes(len(shard["counts"]["train"]))
        check_batches([resolved.train.batch_size], shard, context)
        origin = begin_from(resolved, shard, context)
        context.tracking.log_params(run_id, {"init": origin})
        prices = read_prices(placement.prices)
        worked_hours = _check_resume(out, placement, (shard["digest"], training_digest(complete)), context)
        job = LoggedJob(
            name="train",
            placement=placement,
            dataset=(context.store.at(shard["data"]), shard["digest"]),
            config=resolved,
            out=out,
            init=kept_uri(resolved, context.store),
            check=fenced_check(context.check),
            tracking=context.tracking,
            run_id=run_id,
            profile=context.profile,
        )
        out.delete(PROFILE)  # left by an interrupted process
        # A checkpoint in the old format needs as many workers as wrote it.
        least = placement.workers if begun_training(out)[1] else placement.workers_min or placement.workers
        sizes = resolved.train.sizes(least, placement.workers)
        _fit(job, sizes, worked_hours, context)
        with scratch("result") as folder:
            last = Checkpoints(out).newest(folder, say=context.show.say)
            assert last is not None, "the training ended without a checkpoint"
            check_ended(last.described, resolved.train)
            facts = keep_best(last, out, context.run, shard["max_side"], origin=origin)
            usage = read_usage(last.files[USAGE])
        costs = cost_facts(usage, prices)
        context.tracking.log_metrics(run_id, costs, step=facts["epochs"])
        context.show.say(cost_line(usage, facts["epochs"], prices))
    measured = {"usage": {**costs, "gpus": {**usage.gpu_s}}, **_profiled(out, context)}
    return {**facts, **measured, "mlflow_run": run_id, "resolved": resolved.model_dump(mode="json")}


def check_ended(described: Mapping[str, Any], train: TrainConfig) -> None:
    """Raises ResumeError if the newest usable checkpoint is not the last one of the training."""
    state = state_of(described)
    if state.epoch < train.epochs and not state.is_stale(train.patience):
        raise ResumeError(
            f"the last checkpoint of the training is damaged, and the newest usable one is of epoch {state.epoch} of "
            f"{train.epochs}: {RESUME}"
        )


def check_batches(sizes: Sequence[int], shard: dict, context: StepContext) -> None:
    """Raises ValueError if the training split does not fill a batch of one of the sizes."""
    data = open_dataset(context.store.at(shard["data"]), digest=shard["digest"])
    held = data.manifest.splits["train"].samples
    if max(sizes) > held:
        raise ValueError(
            f"train.batch_size {max(sizes)}: the training split holds {counted(held, 'image')}, and an incomplete "
            f"batch is dropped; use batches of at most {held}"
        )


def ray_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs on every worker of Ray Train; returns the reason and step of an early stop, or an empty dict at the end.

    `settings` has a LoggedJob as "job". Raises Stopped if the group stops in order to restart.
    """
    import ray.train
    import torch

    from pipelines.worker.meter.speed_check import speed_check

    job: LoggedJob = settings["job"]
    place = ray.train.get_context()
    rank, ranks = place.get_world_rank(), place.get_world_size()
    # A group may have fewer workers than the driver's placement.
    placement = Placement.model_validate({**job.placement.model_dump(), "workers": ranks})
    job = replace(job, placement=placement)
    outbox = Outbox(job.tracking, job.run_id, begin=lambda what: job.post(begin=what))

    def judge() -> Callable[[dict[str, float]], str]:
        gpu = torch.cuda.get_device_name() if placement.device == "cuda" else ""
        return tagging(speed_check(job.config, placement, gpu), outbox)

    control = ray_control(rank, ranks, placement, job.board)
    keep = functools.partial(keep_profile, job.out) if job.profile else None
    try:
        run_job(job, outbox, control, judge=judge, keep_profile=keep)
    except Stopped as stopped:
        if stopped.reason in RESTARTING:
            raise
        return {"reason": stopped.reason, "step": stopped.step}
    return {}


def ray_control(rank: int, ranks: int, placement: Placement, board: Any) -> Control:
    """The control that tells this rank when to write a checkpoint and when to stop."""
    ahead = 4 if placement.device == "cuda" else 1  # how many steps the host is ahead of its GPU
    return Control(
        rank,
        SharedFlags(lag=ahead) if ranks > 1 else OwnFlags(),
        board=board,
        checkpoint_s=placement.checkpoint_minutes * 60,
        checkpoint_steps=placement.checkpoint_steps,
        flag=wants_to_stop,
    )


def keep_profile(out: Store, summary: dict[str, Any], trace: Path) -> None:
    """Stores a profile in the step's folder, on the worker; the summary last, which marks it as complete."""
    out.put(TRACE, trace.read_bytes())
    out.put(PROFILE, json.dumps(summary, indent=2).encode())


def tagging(check: Callable[[dict[str, float]], str], outbox: Outbox) -> Callable[[dict[str, float]], str]:
    """Wraps a speed check so that its warning also becomes a tag of the MLflow run."""

    def judge(metrics: dict[str, float]) -> str:
        warning = check(metrics)
        if warning:
            outbox.tags({SLOW: warning})
        return warning

    return judge


def _fit(job: LoggedJob, sizes: Sequence[int], worked_hours: float, context: StepContext) -> None:
    """Trains with as many workers as the largest of `sizes`, or with fewer if nodes are lost.

    Raises SystemExit if the training stopped at a checkpoint because this process was asked to end.
    """
    import ray.train

    from pipelines.worker.group.process_group import GroupConfig

    placement = job.placement
    resources = {"CPU": placement.cpus_per_worker} | ({"GPU": 1} if placement.device == "cuda" else {})
    with Watch(context.show.progress) as board, scratch("ray-train") as folder:
        board.count_from.remote(worked_hours)
        trainer = _trainer(board, sizes, placement)(
            ray_worker,
            train_loop_config={"job": replace(job, board=board)},
            backend_config=GroupConfig(placement.backend),
            scaling_config=ray.train.ScalingConfig(
                num_workers=placement.workers, use_gpu=placement.device == "cuda", resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                # Ray needs a folder but stores nothing in it: the workers write the checkpoints themselves.
                storage_path=str(folder),
                # For a Ray whose policies cannot be replaced. On one machine a crash nearly always repeats.
                failure_config=ray.train.FailureConfig(max_failures=2 if placement.nodes > 1 else 0),
            ),
        )
        workers = counted(placement.workers, "training worker")
        context.show.begin(f"starting {workers}")  # until their first step
        stops = Stops(board, context.show.say, until=context.until)
        with unwrapped(), stops.heeded():
            result = trainer.fit()
    stops.raise_if_ended(result.return_value)


def _trainer(board: Any, sizes: Sequence[int], placement: Placement) -> Callable[..., Any]:
    """Returns the factory of Ray's trainer, with our policies if they were tested with this version of Ray."""
    if not ray_internals.are_known():
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        return DataParallelTrainer
    from pipelines.worker.group.trainer import LocalTrainer, WatchedTrainer

    kind = WatchedTrainer if os.environ.get("RAY_ADDRESS") else LocalTrainer

    def make(*arguments: Any, **settings: Any) -> Any:
        limits = Limits(placement.stall_minutes * 60, max(SLOW_S, placement.patience_s + PATIENCE_MARGIN_S))
        return kind(*arguments, **settings).watched(board, sizes=sizes, limits=limits)

    return make


def keep_best(
    last: Found, out: Store, run: str, max_side: int | None, *, origin: Mapping[str, str] = MappingProxyType({})
) -> dict:
    """Copies the best epoch's model to `out/model`; returns the training's facts.

    The card gets `max_side`, so that predictions shrink images as the shards did, and the `origin` of the weights that
    the training started from.
    """
    described = json.loads(last.best[MODEL].read_text())
    described["card"]["max_side"] = max_side
    if origin:
        described["card"]["init"] = {key: origin[key] for key in ("uri", "digest")}
    files = {
        WEIGHTS: last.best[WEIGHTS].read_bytes(),
        MODEL: json.dumps(described, indent=2, sort_keys=True).encode(),
    }
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(data)
        out.put(f"model/{name}", data)
    state = last.described
    return {
        "digest": digest.hexdigest(),
        "model": f"runs/{run}/train/model",
        "compile": state["compile"],
        "best_epoch": state["best_epoch"],
        "epochs": state["epoch"],
        "metrics": state["best"],
        "history": state["history"],
        **({"init": dict(origin)} if origin else {}),
    }


def _profiled(out: Store, context: StepContext) -> dict[str, Any]:
    """The profile that a worker has stored, as a fact; empty if none was requested."""
    if not context.profile:
        return {}
    if out.head(PROFILE) is None:
        context.show.say("nothing was profiled: no epoch was left to train")
        return {}
    return {"profile": {**json.loads(out.get(PROFILE)), "trace": f"{out.uri}/{TRACE}"}}


def begun_training(out: Store) -> tuple[dict[str, Any] | None, bool]:
    """(fields of the newest train.json, whether it is in the old format); (None, False) if nothing was saved."""
    if described := Checkpoints(out).newest_state():
        return described, False
    old = find_old_checkpoint(out)
    # The first release did not record `compile` and `flat`: it had neither.
    return ({"compile": "off", "flat": False, **old.described}, True) if old else (None, False)


def _check_resume(out: Store, placement: Placement, of: tuple[str, str], context: StepContext) -> float:
    """Reports where a training resumes; returns the worker-hours used so far.

    Raises ResumeError, before any worker starts, if it could not resume exactly."""
    manifest, training = of
    with scratch("resume") as folder:
        resume = find_resume(Checkpoints(out), folder, manifest, training=training, say=context.show.say)
        if resume is None:
            return 0.0
        resume.placement(placement)
        context.show.say(resume.summary)
        return resume.usage.gpu_hours or resume.usage.wall_s * resume.described["ranks"] / 3600
