"""The two ways a training starts: as a Ray Train worker among others, or alone inside a Tune trial's process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    """Hands the loop's reports to the driver's terminal and to whoever decides about a trial."""

    def __init__(
        self,
        send: Callable[[dict[str, float]], None],
        rank: int,
        board: Any = None,
        name: str = "",
        judge: Callable[[dict[str, float]], str] = lambda metrics: "",
    ) -> None:
        """`judge` returns a warning about an epoch's metrics, or nothing; it is shown to the user."""
        self._send, self._rank, self._board, self._name = send, rank, board, name
        self._judge, self._last = judge, 0.0

    def progress(self, **values: Any) -> None:
        """At most twice a second, rank 0 alone: posts to the board the driver's terminal reads."""
        now = time.monotonic()
        if self._board is not None and self._rank == 0 and now - self._last >= PROGRESS_EVERY_S:
            self._last = now
            # Only now is the device waited for: a loss read after every step would stall a GPU.
            post(self._board, self._name, values)

    def begin(self, what: str) -> None:
        """Rank 0 alone: posts what takes a while before the next step."""
        if self._board is not None and self._rank == 0:
            post(self._board, self._name, {"begin": what})

    def warn(self, text: str) -> None:
        """Rank 0 alone: posts a line for the user."""
        if self._board is not None and self._rank == 0:
            post(self._board, self._name, {"warning": text})

    def epoch(self, metrics: dict[str, float], step_losses: list[float]) -> None:
        """Every rank hands on the metrics; rank 0 posts them."""
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
    """Builds the model and the engine on this rank and runs the loop; returns the final state.

    It resumes from the newest of `checkpoints`. `dataset` is the folder of a dataset in a store, or its uri, and the
    digest its manifest must have; `journal` is kept by rank 0; `init` is the folder of the weights that
    `config.train.init` is the digest of. With `keep_profile` rank 0 profiles a few steps and hands it the summary and
    the trace (see profile.StepProfiler).
    """
    import torch

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
    """Raises RuntimeError where the ranks would resume at different steps: one was written while they looked."""
    steps = engine.gather(resume.state.step if resume else 0)
    if len(set(steps)) > 1:
        raise RuntimeError(f"the ranks found checkpoints of steps {steps}: they must resume from the same one")


def world_of_one(backend: str) -> None:
    """Makes this process a group of its own in torch.distributed, for a trial. It listens to this machine only."""
    import torch.distributed as dist

    bind_collectives(LOOPBACK)
    # DeepSpeed reads these. Nobody meets at the address: the store is in the memory of this process.
    os.environ.update({"MASTER_ADDR": LOOPBACK, "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
