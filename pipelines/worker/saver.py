"""What a training does between two steps besides training: it writes checkpoints, and stops where it must."""

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
    """Saves one training. Every rank has one, and calls it at the same points: writing collects the ranks' parts."""

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
        """After a step, or within the validation after it: writes the checkpoint that is wanted, unless there is one.

        `losses` are those of the epoch's steps. Raises Stopped, after a checkpoint of the step, where the training must
        stop; what kept a checkpoint from being stored; what the journal has failed with for good.
        """
        self._writer.check()
        self._check_journal(losses)
        wanted = self._control.wants(self._state.step, self._writer)
        if wanted.checkpoint or wanted.stop:
            self._save(losses)
        if wanted.stop:
            with self._control.busy("writing a checkpoint"):
                self._writer.finish()
                self._engine.gather(None)  # a rank that ends first would end the others
            self._journal.check()  # what this rank asked all of them to stop for
            raise Stopped(wanted.stop, self._state.step)

    def looking(
        self, forward: Callable[[torch.Tensor], torch.Tensor], losses: Sequence[torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """`forward` for a validation: a stop ends it at its next batch, for a validation may take longer than whoever
        asks for the stop waits."""

        def call(images: torch.Tensor) -> torch.Tensor:
            found = forward(images)
            self.look(losses)
            return found

        return call

    def end_epoch(self, metrics: Mapping[str, float], step_losses: Sequence[float]) -> None:
        """Records an epoch that has ended, and writes its checkpoint."""
        try:
            self._journal.epoch(metrics, step_losses)
        except Exception:
            if not self._control.give_up():
                raise
        self._state.unsent = self._journal.unsent()
        self._writer.save(self._state, self._meter.usage)  # between two epochs there are no losses to resume with

    def _save(self, losses: Sequence[torch.Tensor]) -> None:
        if self._saved_step == self._state.step:
            return
        self._saved_step = self._state.step
        with self._meter.writing():
            self._state.unsent = self._journal.unsent()
            self._writer.save(self._state, self._meter.usage_now(self._engine.ranks), torch.stack(list(losses)))

    def _check_journal(self, losses: Sequence[torch.Tensor]) -> None:
        """Where the journal has failed for good all ranks stop together, if anything tells them; else this one alone,
        after a checkpoint where it can write one."""
        try:
            self._journal.check()
        except Exception:
            if self._control.give_up():
                return
            if self._engine.ranks == 1 or self._engine.placement.zero_stage == 0:
                self._save(losses)
            raise
