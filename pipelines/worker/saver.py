"""Work between two training steps: writing checkpoints, and stopping when asked to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from pipelines.worker.checkpoint.writer import CheckpointWriter
from pipelines.worker.engine.engine import Engine
from pipelines.worker.group.control import Stopped, UntilTheEnd
from pipelines.worker.journal import Journal
from pipelines.worker.meter.speed import Meter
from pipelines.worker.state import TrainState


class Saver:
    """Saves one training. Every rank must call it at the same points, because writing gathers all ranks' parts."""

    def __init__(
        self,
        state: TrainState,
        engine: Engine,
        writer: CheckpointWriter,
        *,
        control: UntilTheEnd,
        journal: Journal,
        meter: Meter,
    ) -> None:
        self._state, self._engine, self._writer = state, engine, writer
        self._control, self._journal, self._meter = control, journal, meter
        self._saved_step = -1

    def look(self, losses: Sequence[torch.Tensor]) -> None:
        """Called after each step and during validation: writes a checkpoint if one is due and not yet written.

        Args:
            losses: Scalar loss of each step of the epoch so far.

        Raises:
            Stopped: The training must stop; a checkpoint of this step has been written.
            Exception: The error that an earlier checkpoint write or the journal failed with permanently.
        """
        self._writer.check()
        self._check_journal(losses)
        wanted = self._control.wants(self._state.step, self._writer)
        if wanted.checkpoint or wanted.stop:
            self._save(losses)
        if wanted.stop:
            with self._control.busy("writing a checkpoint"):
                self._writer.finish()
                self._engine.gather(None)  # a rank that exits early would take the others down
            self._journal.check()  # the error that made this rank ask all of them to stop
            raise Stopped(wanted.stop, self._state.step)

    def looking(
        self, forward: Callable[[torch.Tensor], torch.Tensor], losses: Sequence[torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Wraps `forward` for validation so that a stop takes effect at the next batch.

        A complete validation can take longer than the sender of the stop waits.
        """

        def call(images: torch.Tensor) -> torch.Tensor:
            logits = forward(images)
            self.look(losses)
            return logits

        return call

    def end_epoch(self, metrics: Mapping[str, float], step_losses: Sequence[float]) -> None:
        """Records a finished epoch and writes its checkpoint."""
        try:
            self._journal.epoch(metrics, step_losses)
        except Exception:  # broad: whatever failed on this rank, all ranks must stop together
            if not self._control.give_up():
                raise
        self._state.unsent = self._journal.unsent()
        self._writer.save(self._state, self._meter.usage)  # without losses: none belong to an unfinished epoch

    def _save(self, losses: Sequence[torch.Tensor]) -> None:
        if self._saved_step == self._state.step:
            return
        self._saved_step = self._state.step
        with self._meter.writing():
            self._state.unsent = self._journal.unsent()
            self._writer.save(self._state, self._meter.usage_now(self._engine.ranks), torch.stack(list(losses)))

    def _check_journal(self, losses: Sequence[torch.Tensor]) -> None:
        """Stops the training if the journal has failed permanently.

        All ranks stop together if `control` can reach them. Otherwise only this rank stops, after a checkpoint if it
        can write one alone.
        """
        try:
            self._journal.check()
        except Exception:  # broad: whatever failed on this rank, all ranks must stop together
            if self._control.give_up():
                return
            if self._engine.ranks == 1 or self._engine.placement.zero_stage == 0:
                self._save(losses)
            raise
