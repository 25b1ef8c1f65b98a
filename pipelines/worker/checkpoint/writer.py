"""Writes checkpoints in the background: the training thread only copies tensors, a second thread stores them."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data_shards.store import StoreAwayError, StoreError, StorePathError
from data_shards.store.disk import DiskFullError
from data_shards.store.fenced_lease import LostLeaseError
from data_shards.store.outage import PATIENCE_S
from medmamba.config import MODEL, WEIGHTS
from pipelines.scratch import scratch
from pipelines.worker.checkpoint.stored import MOMENTS, Checkpoints
from pipelines.worker.checkpoint.usage import USAGE, Usage, usage_bytes
from pipelines.worker.engine.engine import Engine
from pipelines.worker.engine.snapshot import Snapshot
from pipelines.worker.state import TrainState, describe

LAST_WAIT_S = 60.0  # how long a failed training waits for a checkpoint in progress
_PAUSES_S = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class _Job:
    snapshot: Snapshot
    state: TrainState
    usage: Usage
    losses: torch.Tensor


class CheckpointWriter:
    """Stores the checkpoints of one training in order while it continues. A context manager.

    On ranks other than 0 it only takes part in the collectives.

    Args:
        checkpoints: Where they are stored.
        engine: The engine to copy the state from.
        model_json: The bytes of model.json.
        about: Further fields of train.json (seed, placement, manifest), for `describe`.
        warn: Called with a line when the store is unavailable, and when it is back.
        stored: Called from the thread with the step of each checkpoint that is complete in the store.
        patience_s: How long the store may be unavailable before `save` and `finish` raise its error.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Engine,
        *,
        model_json: bytes,
        about: dict[str, Any],
        warn: Callable[[str], None] = lambda text: None,
        stored: Callable[[int], None] = lambda step: None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._checkpoints, self._engine, self._model_json, self._about = checkpoints, engine, model_json, about
        self._warn, self._stored, self._patience_s = warn, stored, patience_s
        self._waiting: list[_Job] = []
        self._changed = threading.Condition()
        self._writes = self._is_over = False
        self._error: BaseException | None = None
        on_gpu = engine.device.type == "cuda"
        # One stream for all checkpoints: torch has a pool of only 32 and hands them out again.
        self._stream = torch.cuda.Stream(engine.device) if on_gpu else None
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)

    def __enter__(self) -> CheckpointWriter:
        if self._engine.rank == 0:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.finish()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(LAST_WAIT_S)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is still being written or waits to be."""
        return self._writes or bool(self._waiting)

    def save(self, state: TrainState, usage: Usage, losses_S: torch.Tensor | None = None) -> None:
        """Copies the training's state and queues it to be stored; every rank must call it at the same step.

        `losses_S` (S,) are the losses of the current epoch's steps, on the device and no longer modified. They replace
        those in `state`, so that this call need not wait for the device. None: no losses.

        If the store is slow, only the newest waiting checkpoint and those of best epochs are stored.
        Raises the error that an earlier checkpoint failed with.
        """
        self.check()
        snapshot = self._engine.snapshot()
        if snapshot is None:
            return
        job = _Job(snapshot, copy.deepcopy(state), usage, torch.empty(0) if losses_S is None else losses_S)
        with self._changed:
            needed = [waiting for waiting in self._waiting if waiting.state.step == state.best_step]
            self._waiting = [*needed, job]
            self._changed.notify_all()

    def finish(self) -> None:
        """Waits until everything is stored; raises the error if a write failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self.is_busy or self._error is not None)
        self.check()

    def check(self) -> None:
        """Raises the error that a checkpoint failed with, such as a full disk or an unavailable store."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._store(job)
            except BaseException as error:  # broad: an exception in this thread must end the training
                self._error = error
            with self._changed:
                self._writes = False
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_over)
            if self._is_over or self._error is not None:
                return None
            self._writes = True
            return self._waiting.pop(0)

    def _store(self, job: _Job) -> None:
        with scratch("checkpoint") as folder:
            files = {name: folder / name for name in (WEIGHTS, MODEL, MOMENTS, USAGE)}
            job.snapshot.write(files[WEIGHTS], files[MOMENTS], self._stream)
            job.state.losses = job.snapshot.listed(job.losses, self._stream)
            files[MODEL].write_bytes(self._model_json)
            files[USAGE].write_bytes(usage_bytes(job.usage))
            described = describe(job.state, **self._about)
            self._patiently(lambda: self._checkpoints.write(job.state.step, files, described), job.state.step)
        self._stored(job.state.step)

    def _patiently(self, write: Callable[[], None], step: int) -> None:
        """Retries `write` on store errors; raises the last one after `patience_s`."""
        began_s, tries = time.monotonic(), 0
        while True:
            try:
                write()
            except (DiskFullError, LostLeaseError, StoreAwayError, StorePathError):  # retrying would not help
                raise
            except StoreError as error:
                gone_s = time.monotonic() - began_s
                if gone_s >= self._patience_s or self._is_over:
                    raise
                if not tries:
                    minutes = f"{self._patience_s / 60:.0f} minutes"
                    self._warn(
                        f"the checkpoint of step {step} cannot be stored ({error}); training continues, retrying for "
                        f"{minutes}"
                    )
                time.sleep(min(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)], self._patience_s))
                tries += 1
            else:
                if tries:
                    self._warn(f"the checkpoint of step {step} was stored {time.monotonic() - began_s:.0f} s late")
                return
