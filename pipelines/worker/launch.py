"""Starts a training on one rank: as one of several Ray Train workers, or alone in a Tune trial's process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_shards.manifest import open_dataset
from data_shards.store import Store
from medmamba.finetune import choose_head, freeze, start_from
from medmamba.model import build_model
from pipelines.cluster.board import post
from pipelines.placement import Placement
from pipelines.scratch import scratch
from pipelines.worker.checkpoint.initial import read_kept
from pipelines.worker.checkpoint.resume import Resume, find_resume
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.engine.compile_cache import decide_compile
from pipelines.worker.engine.engine import Engine, build_engine
from pipelines.worker.group.control import UntilTheEnd
from pipelines.worker.group.network import LOOPBACK, bind_collectives
from pipelines.worker.journal import Journal
from pipelines.worker.loop import train_loop
from pipelines.worker.meter.profile import StepProfiler
from pipelines.worker.state import TrainState, training_digest

PROGRESS_EVERY_S = 0.5


class RayReporter:
    """Forwards the loop's reports to the driver's terminal and to Ray Train or Tune."""

    def __init__(
        self,
        send: Callable[[dict[str, float]], None],
        rank: int,
        board: Any = None,
        name: str = "",
        judge: Callable[[dict[str, float]], str] = lambda metrics: "",
    ) -> None:
        """`send` receives each epoch's metrics; `judge` returns a warning about them for the user, or ""."""
        self._send, self._rank, self._board, self._name = send, rank, board, name
        self._judge, self._last = judge, 0.0

    def progress(self, **values: Any) -> None:
        """Posts progress to the board, from rank 0 at most twice a second."""
        now = time.monotonic()
        if self._board is not None and self._rank == 0 and now - self._last >= PROGRESS_EVERY_S:
            self._last = now
            post(self._board, self._name, values)

    def begin(self, what: str) -> None:
        """Posts from rank 0 that something slow has started."""
        if self._board is not None and self._rank == 0:
            post(self._board, self._name, {"begin": what})

    def warn(self, text: str) -> None:
        """Posts a warning for the user from rank 0."""
        if self._board is not None and self._rank == 0:
            post(self._board, self._name, {"warning": text})

    def epoch(self, metrics: dict[str, float], step_losses: list[float]) -> None:
        """Sends the metrics on every rank, and posts them from rank 0."""
        self._send(metrics)
        if self._board is not None and self._rank == 0:
            post(self._board, self._name, {**metrics, "finished_epoch": metrics["epoch"]})
            if warning := self._judge(metrics):
                self.warn(warning)


def train_on_dataset(
    config: TrainStepConfig,
    placement: Placement,
    dataset: tuple[Store | str, str],
    reporter: Callable[[int], Any],
    checkpoints: Checkpoints,
    *,
    journal: Journal | None = None,
    init: str = "",
    keep_profile: Callable[[dict[str, Any], Path], None] | None = None,
    control: UntilTheEnd | None = None,
) -> TrainState:
    """Builds the model and the engine on this rank, runs the loop and returns the final state.

    Args:
        config: What to train.
        placement: Where and how it runs.
        dataset: The dataset's folder in a store (or its URI) and the digest that its manifest must have.
        reporter: Makes the loop's reporter for a rank.
        checkpoints: The training resumes from the newest of these.
        journal: Records the epochs; only rank 0 uses it.
        init: Folder of the initial weights, whose digest is `config.train.init`; empty: random weights.
        keep_profile: If given, rank 0 profiles a few steps and passes on the summary and the trace (StepProfiler).
        control: Requests checkpoints and stops; None: train to the end.

    Raises:
        RuntimeError: The ranks found different checkpoints.
        ResumeError: The checkpoint cannot be continued exactly.
        TrainingError: The training diverged.
    """
    data = open_dataset(dataset[0], digest=dataset[1])
    torch.manual_seed(config.train.seed)
    config = config.with_classes(len(data.manifest.classes))
    notices: list[str] = []
    with scratch("resume") as folder:
        resume = find_resume(checkpoints, folder, data.digest, training=training_digest(config), say=notices.append)
        if resume is not None:
            placement = resume.placement(placement)
        placement, hindrance = decide_compile(placement, config, data)
        model = build_model(config.model, scan=placement.scan, device=placement.device)
        if resume is not None:
            resume.load_weights(model)
        elif init:
            state, card = read_kept(init, config.train.init)
            start_from(model, state, choose_head(card, data.manifest.classes, data.manifest.task), where=init)
        freeze(model, config.train.freeze)
        engine = build_engine(model, config.train, placement)
        _check_agreement(engine, resume)
        profiler = StepProfiler(engine.device, keep_profile) if keep_profile and engine.rank == 0 else None
        report = reporter(engine.rank)
        for notice in [*notices, *([hindrance] if hindrance else [])]:
            report.warn(notice)
        return train_loop(
            config, placement, data, engine, report, checkpoints, resume, profiler=profiler, control=control,
            journal=journal if engine.rank == 0 else None,
        )  # fmt: skip


def _check_agreement(engine: Engine, resume: Resume | None) -> None:
    """Raises RuntimeError if the ranks would resume at different steps."""
    steps = engine.gather(resume.state.step if resume else 0)
    if len(set(steps)) > 1:
        raise RuntimeError(
            f"the ranks found checkpoints of steps {steps}, but must resume from the same one: a checkpoint was "
            "written while they started; run the same command again"
        )


def world_of_one(backend: str) -> None:
    """Initializes torch.distributed with this process as the only rank, for a trial; opens no socket to the outside."""
    bind_collectives(LOOPBACK)
    # DeepSpeed requires these variables. The address is not used: the store is in this process's memory.
    os.environ.update({"MASTER_ADDR": LOOPBACK, "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
