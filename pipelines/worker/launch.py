"""The two ways a training starts: as a Ray Train worker among others, or alone inside a Tune trial's process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.manifest import open_dataset
from data_shards.store import Store
from medmamba.finetune import choose_head, freeze, start_from
from medmamba.model import build_model
from pipelines.board import post
from pipelines.initial_weights import read_kept
from pipelines.outbox import Outbox
from pipelines.placement import Placement
from pipelines.scratch import scratch
from pipelines.worker.compile_cache import decide_compile
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.engine import build_engine
from pipelines.worker.loop import train_loop
from pipelines.worker.network import LOOPBACK, bind_collectives
from pipelines.worker.profile import StepProfiler
from pipelines.worker.state import TrainState, as_written, read_described

PROGRESS_EVERY_S = 0.5
UNSENT = "unsent.json"  # in a checkpoint: what was logged and is not known to be in MLflow


class RayReporter:
    """Hands the loop's reports to Ray (Train or Tune: both take metrics and a checkpoint folder) and to MLflow."""

    def __init__(
        self,
        send: Callable[..., None],
        rank: int,
        board: Any = None,
        name: str = "",
        outbox: Outbox | None = None,
        judge: Callable[[dict[str, float]], str] = lambda metrics: "",
    ) -> None:
        """`outbox` takes what rank 0 logs; `judge` returns a warning about an epoch's metrics, or nothing; it is shown
        to the user."""
        self._send, self._rank, self._board, self._name, self._outbox = send, rank, board, name, outbox
        self._judge, self._last = judge, 0.0

    def progress(self, **values: Any) -> None:
        """At most twice a second, rank 0 alone: posts to the board the driver's terminal reads."""
        if self._outbox is not None:
            self._outbox.check()
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

    def epoch(self, metrics: dict[str, float], step_losses: list[float], save: Callable[[Path], None]) -> None:
        """Every rank: uploads this rank's share of the checkpoint, then hands on the metrics."""
        from ray.train import Checkpoint

        if self._outbox is not None:
            self._outbox.epoch(metrics, step_losses)
        with scratch("checkpoint") as folder:
            save(folder)
            if self._outbox is not None:
                (folder / UNSENT).write_text(json.dumps(self._outbox.unsent()))
            self._send(metrics, checkpoint=Checkpoint.from_directory(folder))
        if self._board is not None and self._rank == 0:
            post(self._board, self._name, {**metrics, "finished_epoch": metrics["epoch"]})
            if warning := self._judge(metrics):
                self.warn(warning)


def train_on_dataset(
    config: TrainStepConfig,
    placement: Placement,
    dataset: tuple[Store | str, str],
    reporter: Callable[[int], Any],
    resume: Path | None,
    *,
    init: str = "",
    keep_profile: Callable[[dict[str, Any], Path], None] | None = None,
) -> TrainState:
    """Builds the model and the engine on this rank and runs the loop; returns the final state.

    `dataset` is the folder of a dataset in a store, or its uri, and the digest its manifest must have; `init` the
    folder of the weights that `config.train.init` is the digest of. With `keep_profile` rank 0 profiles a few steps and
    hands it the summary and the trace (see profile.StepProfiler).
    """
    import torch

    data = open_dataset(dataset[0], digest=dataset[1])
    torch.manual_seed(config.train.seed)
    config = config.with_classes(len(data.manifest.classes))
    if resume is not None:  # a trial's is known only here; it may be of another version of this code
        placement = as_written(placement, resume)
    placement, hindrance = decide_compile(placement, config, data)
    model = build_model(config.model, scan=placement.scan, device=placement.device)
    if init and resume is None:
        state, card = read_kept(init, config.train.init)
        start_from(model, state, choose_head(card, data.manifest.classes, data.manifest.task), where=init)
    freeze(model, config.train.freeze)
    engine = build_engine(model, config.train, placement)
    profiler = StepProfiler(engine.device, keep_profile) if keep_profile and engine.rank == 0 else None
    report = reporter(engine.rank)
    if hindrance:
        report.warn(hindrance)
    return train_loop(config, placement, data, engine, report, resume, profiler)


def resume_outbox(outbox: Outbox, folder: Path) -> None:
    """Hands on what the checkpoint in `folder` holds of the epochs before."""
    kept = folder / UNSENT  # checkpoints of earlier versions have none
    unsent = json.loads(kept.read_text()) if kept.is_file() else []
    outbox.resume(read_described((folder / "train.json").read_bytes())["history"], unsent)


def world_of_one(backend: str) -> None:
    """Makes this process a group of its own in torch.distributed, for a trial. It listens to this machine only."""
    import torch.distributed as dist

    bind_collectives(LOOPBACK)
    # DeepSpeed reads these. Nobody meets at the address: the store is in the memory of this process.
    os.environ.update({"MASTER_ADDR": LOOPBACK, "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
