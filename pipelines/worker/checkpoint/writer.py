"""Writes checkpoints beside the training: the training thread only copies tensors, a thread does the rest."""

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

LAST_WAIT_S = 60.0  # how long a training that failed waits for the checkpoint on its way
_PAUSES_S = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class _Job:
    snapshot: Snapshot
    state: TrainState
    usage: Usage
    losses: torch.Tensor


class CheckpointWriter:
    """Stores the checkpoints of one training, in order, while it continues. A context manager; on ranks other than 0 it
    only takes part in the collectives.

    Args:
        model_json: The bytes of model.json.
        about: What train.json says beside the state (seed, placement, manifest), for `describe`.
        warn: Gets a line where the store is away, and one when it is back.
        stored: Called in the thread with the step of each checkpoint that is complete in the store.
        patience_s: How long a store may be away before `save` and `close` raise its error.
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
        # One for all checkpoints: torch hands out the same 32 again and again.
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
        """Whether a checkpoint is still on its way to the store."""
        return self._writes or bool(self._waiting)

    def save(self, state: TrainState, usage: Usage, losses_S: torch.Tensor | None = None) -> None:
        """Copies the training as it is now and has it stored; every rank calls it at the same step.

        `losses_S` (S,) are the losses of the current epoch's steps, on the device and no longer written to; they take
        the place of those in `state`, so that nobody waits for the device here. None: there are none.

        Of checkpoints that wait because the store is slow only the newest is stored, and those of best epochs.
        Raises what kept an earlier one from being stored.
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
        """Waits until everything is stored; raises what kept it from being."""
        with self._changed:
            self._changed.wait_for(lambda: not self.is_busy or self._error is not None)
        self.check()

    def check(self) -> None:
        """Raises what kept a checkpoint from being stored: a full disk, a store that stayed away."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._store(job)
            except BaseException as error:  # of a thread: the training has to end with it
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
        """Calls `write` until the store takes it; raises its last error once the patience is used up."""
        began_s, tries = time.monotonic(), 0
        while True:
            try:
                write()
            except (DiskFullError, LostLeaseError, StoreAwayError, StorePathError):  # waiting does not help, or no more
                raise
            except StoreError as error:
                gone_s = time.monotonic() - began_s
                if gone_s >= self._patience_s or self._is_over:
                    raise
                if not tries:
                    minutes = f"{self._patience_s / 60:.0f} minutes"
                    self._warn(
                        f"the checkpoint of step {step} cannot be stored ({error}); the training continues, and the "
                        f"store is tried again for {minutes}"
                    )
                time.sleep(min(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)], self._patience_s))
                tries += 1
            else:
                if tries:
                    self._warn(f"the checkpoint of step {step} is stored, {time.monotonic() - began_s:.0f} s late")
                return
