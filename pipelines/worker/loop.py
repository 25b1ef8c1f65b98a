"""The training loop, read from top to bottom. It knows no Ray: `report` and `resume` come from whoever launched it."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data_shards.loader import batches
from data_shards.manifest import Dataset
from data_shards.pixels import Crop
from medmamba.loss import class_weights, classification_loss, scores
from medmamba.metrics.classification import evaluate
from medmamba.optim import learning_rate
from pipelines.placement import Placement
from pipelines.scratch import scratch
from pipelines.worker.batch_statistics import BatchStatistics
from pipelines.worker.compile_cache import NOTICE, CompileCache
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.engine import Engine
from pipelines.worker.inference import infer, join
from pipelines.worker.meter import metered
from pipelines.worker.objective import Objective
from pipelines.worker.profile import StepProfiler
from pipelines.worker.state import BEST, TrainState, file_digests, read_state, write_state
from pipelines.worker.step_guard import Skips, TrainingError, name_samples
from pipelines.worker.transfer import Latest, batch_memory, prefetched, to_device

ENGINE = "engine"


class Reporter(Protocol):
    """What the loop tells the outside."""

    def progress(self, **values: Any) -> None:
        """After each step: where the epoch stands. `loss` is that of one of the last steps; 0 before the first."""

    def begin(self, what: str) -> None:
        """Something starts that takes a while and shows no progress of its own."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""

    def epoch(self, metrics: dict[str, float], step_losses: list[float], save: Callable[[Path], None]) -> None:
        """Once an epoch, on every rank: its metrics, the loss of each of its steps, and `save(folder)`, which
        writes this rank's share of the checkpoint."""


def train_loop(
    config: TrainStepConfig,
    placement: Placement,
    data: Dataset,
    engine: Engine,
    report: Reporter,
    resume: Path | None,
    profiler: StepProfiler | None = None,
) -> TrainState:
    """Trains `engine.model` on the train split of `data` and returns the final state (the same on every rank).

    `profiler` looks into a few steps of this rank, and changes nothing.
    Raises TrainingError for a loss that is not finite, ResumeError for a checkpoint that cannot be continued exactly.
    """
    train, manifest = config.train, data.manifest
    accumulation = train.accumulation(engine.ranks)
    objective = Objective(train, manifest.task, _class_weights(config, data, engine.device))
    statistics = BatchStatistics(engine.model, engine.device)
    state = TrainState()
    compiled = CompileCache(config, placement, manifest) if placement.compile == "on" else None
    if compiled is not None and not compiled.is_warm:
        report.begin(NOTICE)
    latest = Latest(engine.device)
    with scratch("train") as folder, metered(config, engine, resume, profiler) as meter:
        best = folder / BEST
        if resume is not None:
            state = read_state(resume, placement=placement, manifest=data.digest)
            engine.load(resume / ENGINE)
            statistics.reload()
            shutil.copytree(resume / BEST, best)

        while state.epoch < train.epochs and not _is_stale(state, train.patience):
            losses: list[torch.Tensor] = []
            meter.begin_epoch()
            stream = batches(
                data, "train", batch=train.batch_size, micro=train.micro_batch, image_size=train.image_size,
                rank=engine.rank, ranks=engine.ranks, seed=train.seed, epoch=state.epoch, start=state.consumed,
                train=True, sampling=train.sampling, crop=Crop(train.augment.crop) if train.augment.crop else None,
                workers=placement.loader_workers, disk_bytes=placement.cache_bytes, memory=batch_memory(engine.device),
                next_epoch=state.epoch + 1 < train.epochs,
            )  # fmt: skip
            steps = len(stream) // accumulation
            first_step, skipped_before = (
                state.step - state.consumed // train.batch_size,
                engine.guard.look(wait=True).total,
            )
            describe = functools.partial(_describe_step, data, stream.order, train.batch_size, first_step)
            engine.model.train()
            arriving = prefetched(meter.fetched(stream, steps), engine.device)
            for position, (batch, images, labels) in enumerate(arriving):
                nth = position % accumulation
                # Which micro-batch of the global batch this is, not the rank, decides what drop-path draws.
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
                engine.guard.count(state.step)
                _report_skips(engine.guard.look(), report, describe)
                latest.put(losses[-1])
                meter.step(looked=True)  # the loader lets the host be only a few steps ahead of the device
                report.progress(
                    epoch=state.epoch + 1, epochs=train.epochs, step=len(losses), steps=steps, loss=latest.value,
                    images_per_s=meter.images_per_s_last, wait_share=meter.wait_share_last,
                    left_s=meter.left_s((train.epochs - state.epoch) * steps - len(losses)),
                )  # fmt: skip

            step_losses = torch.stack(losses).tolist()
            skips = engine.guard.look(wait=True)
            _report_skips(skips, report, describe)
            finite, skipped = [loss for loss in step_losses if math.isfinite(loss)], skips.total - skipped_before
            skips.check_epoch(skipped, len(step_losses), describe)
            _check_finite(step_losses, skipped, rate)
            meter.end_training()
            with meter.validating():
                found = validate(engine, data, "val", config, objective.weights, placement.loader_workers)
            state.epoch, state.consumed = state.epoch + 1, 0
            metrics = {
                "epoch": state.epoch,
                "step": state.step,
                "train_loss": sum(finite) / len(finite),
                "learning_rate": rate,
                "images_per_s": meter.images_per_s,
                **({"skipped_steps": skipped} if skipped else {}),
                **{f"val_{name}": value for name, value in found.items()},
            }
            if state.is_better(metrics):
                state.best, state.best_epoch = metrics, state.epoch
                with meter.writing():
                    engine.save_model(best, config.model, model_card(config, data))
            state.history.append(metrics)

            def save(folder: Path) -> None:
                engine.save(folder / ENGINE)
                engine.save_model(folder, config.model, model_card(config, data))
                if engine.rank == 0:
                    shutil.copytree(best, folder / BEST)
                    meter.save(folder)
                # Each rank holds its own share of engine/; Ray puts the shares together.
                shares = engine.gather(file_digests(folder))
                digests = {name: digest for share in shares for name, digest in share.items()}
                if engine.rank == 0:
                    write_state(
                        folder, state, seed=train.seed, placement=placement, manifest=data.digest, digests=digests
                    )

            figures = meter.epoch(engine.gather)  # not in the history, which an interrupted training must repeat
            with meter.writing():
                report.epoch({**metrics, **figures}, step_losses, save)
    return state


def validate(
    engine: Engine, data: Dataset, split: str, config: TrainStepConfig, weights: torch.Tensor | None, workers: int
) -> dict[str, float]:
    """Loss and metrics of `split`, the same on every rank; every sample counts once, padding not at all."""
    engine.model.eval()
    part = infer(
        engine.infer, data, split, micro_batch=config.train.micro_batch, image_size=config.train.image_size,
        rank=engine.rank, ranks=engine.ranks, device=engine.device, workers=workers,
    )  # fmt: skip
    labels, logits = (torch.from_numpy(x) for x in join(engine.gather(part), len(data.index(split)), split))
    task = data.manifest.task
    # The unsmoothed loss: label smoothing would set a floor that hides how good the probabilities are.
    loss = classification_loss(logits, labels, task, weights=None if weights is None else weights.cpu())
    if not math.isfinite(float(loss)):
        raise TrainingError(f"the {split} loss is {float(loss)}: the weights overflowed; lower train.optim.lr")
    return {"loss": float(loss), **evaluate(scores(logits, task).numpy(), labels.numpy(), task)}


def model_card(config: TrainStepConfig, data: Dataset) -> dict:
    """What whoever uses the weights has to know beside them."""
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


def _is_stale(state: TrainState, patience: int) -> bool:
    return patience > 0 and state.epoch - state.best_epoch >= patience


def _seed(seed: int, step: int, micro_batch: int) -> None:
    """Seeds what drop-path draws from."""
    # Far apart for neighbours: torch's generators mix the bits of their seed.
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + micro_batch)


def _report_skips(skips: Skips, report: Reporter, describe: Callable[[int], str]) -> None:
    if skips.new:
        report.warn(skips.notice)
        skips.check_row(describe)


def _describe_step(data: Dataset, order: np.ndarray, batch_size: int, first_step: int, step: int) -> str:
    """Which samples a step of this epoch took."""
    begin = (step - first_step - 1) * batch_size
    keys = data.index("train").key[order[begin : begin + batch_size]]
    return f"Step {step} took the samples {name_samples(keys.tolist())}"


def _check_finite(losses: Sequence[float], skipped: int, rate: float) -> None:
    """Raises TrainingError where a step that was made had a loss that is not finite, though its gradients were."""
    wrong = [loss for loss in losses if not math.isfinite(loss)]
    if len(wrong) > skipped:
        raise TrainingError(
            f"the training loss is {wrong[0]} (learning rate {rate:g}): it must stay finite; lower train.optim.lr, set "
            f"train.optim.clip_norm, or use precision float32"
        )
