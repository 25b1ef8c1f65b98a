"""The training loop, written to be read from top to bottom. It does not depend on Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from data_shards.loader import BatchPlan, Loader
from data_shards.loader.pixels import Crop
from data_shards.manifest import Dataset
from medmamba.checkpoint import description
from medmamba.loss import class_weights, classification_loss, scores
from medmamba.metrics.classification import evaluate
from medmamba.optim import learning_rate
from pipelines.placement import Placement
from pipelines.worker.checkpoint.resume import Resume
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.checkpoint.usage import Usage
from pipelines.worker.checkpoint.writer import CheckpointWriter
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.engine.batch_statistics import BatchStatistics
from pipelines.worker.engine.compile_cache import NOTICE, CompileCache, is_compiled
from pipelines.worker.engine.engine import Engine
from pipelines.worker.engine.objective import Objective
from pipelines.worker.engine.step_guard import TrainingError, watch_steps
from pipelines.worker.group.control import UntilTheEnd
from pipelines.worker.inference import infer, join
from pipelines.worker.journal import Journal
from pipelines.worker.meter.profile import StepProfiler
from pipelines.worker.meter.speed import metered
from pipelines.worker.saver import Saver
from pipelines.worker.state import TrainState, training_digest
from pipelines.worker.transfer import Latest, batch_memory, prefetched, to_device


class Reporter(Protocol):
    """Receives the loop's progress."""

    def progress(self, **values: Any) -> None:
        """Called after each step with the epoch's progress. `loss` is of a recent step; 0 before the first arrives."""

    def begin(self, what: str) -> None:
        """Called before something slow that reports no progress of its own."""

    def warn(self, text: str) -> None:
        """Called with a warning for the user."""

    def epoch(self, metrics: dict[str, float], step_losses: list[float]) -> None:
        """Called once per epoch on every rank with its metrics and the loss of each of its steps."""


def train_loop(
    config: TrainStepConfig,
    placement: Placement,
    data: Dataset,
    engine: Engine,
    report: Reporter,
    checkpoints: Checkpoints,
    resume: Resume | None,
    *,
    profiler: StepProfiler | None = None,
    control: UntilTheEnd | None = None,
    journal: Journal | None = None,
) -> TrainState:
    """Trains `engine.model` on the train split of `data` and returns the final state (the same on every rank).

    Args:
        config: What to train.
        placement: Where and how it runs.
        data: The dataset, with the splits train and val.
        engine: This rank's engine, built for `config` and `placement`.
        report: Receives progress, warnings and metrics.
        checkpoints: Where checkpoints are written.
        resume: The point to resume from; None: train from the beginning.
        profiler: Profiles a few steps of this rank without changing the result.
        control: Requests checkpoints between epochs and may stop the training early.
        journal: Records the epochs.

    Raises:
        TrainingError: Too many steps had non-finite gradients, or a loss is not finite.
        ResumeError: The checkpoint cannot be continued exactly.
        Stopped: `control` ended the training early.
    """
    train, manifest = config.train, data.manifest
    accumulation = train.accumulation(engine.ranks)
    objective = Objective(train, manifest.task, _class_weights(config, data, engine.device))
    statistics = BatchStatistics(engine.model, engine.device)
    state, usage, control, journal = TrainState(), Usage(), control or UntilTheEnd(), journal or Journal()
    compiled = CompileCache(config, placement, manifest) if is_compiled(placement, train.precision) else None
    if compiled is not None and not compiled.is_warm:
        report.begin(NOTICE)
    latest = Latest(engine.device)
    if resume is not None:
        state, usage = resume.state, resume.usage
        resume.restore(engine, statistics, checkpoints)
        journal.resume(state.history, state.unsent)
    about = {"seed": train.seed, "placement": placement, "manifest": data.digest, "training": training_digest(config)}
    writer = CheckpointWriter(
        checkpoints, engine, model_json=description(config.model, model_card(config, data)), about=about,
        warn=report.warn, stored=control.saved, patience_s=placement.patience_s,
    )  # fmt: skip
    control.begin(state.step)
    plan = BatchPlan(
        "train", train.batch_size, train.image_size, train=True, micro_batch=train.micro_batch, seed=train.seed,
        sampling=train.sampling, crop=Crop(train.augment.crop) if train.augment.crop else None,
    )  # fmt: skip
    loader = Loader(
        data, rank=engine.rank, ranks=engine.ranks, workers=placement.loader_workers,
        disk_bytes=placement.cache_bytes, memory=batch_memory(engine.device),
    )  # fmt: skip
    with metered(config, engine, usage, profiler) as meter, writer, loader:
        saver = Saver(state, engine, writer, control=control, journal=journal, meter=meter)
        while state.epoch < train.epochs and not state.is_stale(train.patience):
            losses = list(torch.tensor(state.losses, dtype=torch.float32, device=engine.device))
            meter.begin_epoch()
            epoch = loader.epoch(plan, state.epoch, start=state.consumed, next_epoch=state.epoch + 1 < train.epochs)
            steps = len(losses) + len(epoch) // accumulation
            rate = learning_rate(
                train.optim, step=max(state.step - 1, 0), steps_per_epoch=steps, epochs=train.epochs
            )  # of the last step, in case no step of this epoch is left
            keys = data.index("train").key[epoch.order]
            watched = watch_steps(engine.guard, state, keys, train.batch_size, checkpoints.names, report.warn)
            engine.model.train()
            arriving = prefetched(meter.fetched(epoch, steps - len(losses)), engine.device)
            for position, (batch, images, labels) in enumerate(control.fetched(arriving)):
                nth = position % accumulation
                # Drop-path's draws depend on the micro-batch's place in the global batch, not on the rank.
                _seed(train.seed, state.step, nth * engine.ranks + engine.rank)
                rate = learning_rate(train.optim, step=state.step, steps_per_epoch=steps, epochs=train.epochs)
                engine.set_learning_rate(rate)
                draws = to_device(objective.draws(batch), engine.device)
                loss = engine.train(objective, images, labels, draws)
                statistics.collect(loss)
                if nth < accumulation - 1:
                    continue
                losses.append(statistics.update(engine.guard.skipped))
                state.step, state.consumed = state.step + 1, batch.consumed
                if compiled is not None:
                    compiled.remember()
                watched.step(state.step)
                latest.put(losses[-1])
                meter.step(looked=True)  # prefetched() keeps the host only a few steps ahead of the device
                left = (train.epochs - state.epoch) * steps - len(losses)
                report.progress(
                    epoch=state.epoch + 1, epochs=train.epochs, step=len(losses), steps=steps, loss=latest.value,
                    **meter.last_steps(left),
                )  # fmt: skip
                saver.look(losses)

            step_losses = torch.stack(losses).tolist()
            made = watched.made(step_losses)
            meter.end_training()
            with meter.validating(), control.busy("validating"):
                forward = saver.looking(control.counted(engine.infer), losses)
                found = validate(engine, loader, data, "val", config, objective.weights, forward)
            state.epoch, state.consumed, state.losses = state.epoch + 1, 0, []
            metrics = {
                "epoch": state.epoch, "step": state.step, "train_loss": sum(made) / len(made), "learning_rate": rate,
                **meter.speed(), **_skipped(step_losses, made),
                **{f"val_{name}": value for name, value in found.items()},
            }  # fmt: skip
            state.add(metrics)
            figures = meter.epoch(engine.gather)  # not in the history, which must be reproducible after a resume
            with meter.writing(), control.busy("writing a checkpoint"):
                saver.end_epoch({**metrics, **figures}, step_losses)
                report.epoch({**metrics, **figures}, step_losses)
        with control.busy("writing the last checkpoint"):
            writer.finish()
        with control.busy("sending log entries"):
            journal.close()
    return state


def validate(
    engine: Engine,
    loader: Loader,
    data: Dataset,
    split: str,
    config: TrainStepConfig,
    weights: torch.Tensor | None,
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Loss and metrics of `split`, the same on every rank. Every sample counts exactly once, without padding.

    `forward` maps images (B, 3, H, W) to logits (B, num_classes), usually the engine's `infer`.
    Raises TrainingError if the loss is not finite.
    """
    engine.model.eval()
    part = infer(
        forward, loader, split, micro_batch=config.train.micro_batch, image_size=config.train.image_size,
        device=engine.device,
    )  # fmt: skip
    labels, logits = (torch.from_numpy(x) for x in join(engine.gather(part), len(data.index(split)), split))
    task = data.manifest.task
    # Without label smoothing, which would put a floor under the loss.
    loss = classification_loss(logits, labels, task, weights=None if weights is None else weights.cpu())
    if not math.isfinite(float(loss)):
        raise TrainingError(f"the {split} loss is {float(loss)}: the weights overflowed; lower train.optim.lr")
    return {"loss": float(loss), **evaluate(scores(logits, task).numpy(), labels.numpy(), task)}


def model_card(config: TrainStepConfig, data: Dataset) -> dict[str, Any]:
    """What users of the weights need to know in addition to the network's configuration."""
    return {
        "dataset": data.manifest.dataset,
        "manifest": data.digest,
        "task": data.manifest.task,
        "classes": list(data.manifest.classes),
        "image_size": config.train.image_size,
        "channels": data.manifest.channels,
    }


def _class_weights(config: TrainStepConfig, data: Dataset, device: torch.device) -> torch.Tensor | None:
    if not config.train.class_weights:
        return None
    per_class = data.manifest.splits["train"].classes
    return torch.as_tensor(class_weights([per_class[name] for name in data.manifest.classes]), device=device)


def _skipped(losses: list[float], made: list[float]) -> dict[str, float]:
    """The metric `skipped_steps` of an epoch; empty if none was skipped."""
    return {"skipped_steps": len(losses) - len(made)} if len(made) < len(losses) else {}


def _seed(seed: int, step: int, micro_batch: int) -> None:
    """Seeds torch's generators, which drop-path uses."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + micro_batch)
