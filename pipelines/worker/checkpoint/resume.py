"""Finds what a training resumes from: the newest complete checkpoint, or one in this project's first format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.config import WEIGHTS
from pipelines.placement import Placement
from pipelines.wording import counted
from pipelines.worker.checkpoint.stored import FOLDER, MOMENTS, OF_MODEL, Checkpoints, Found
from pipelines.worker.checkpoint.usage import USAGE, Usage, read_usage
from pipelines.worker.engine.first_format import BEST, ENGINE, OldCheckpoint, check_placement, find_old_checkpoint
from pipelines.worker.state import ResumeError, TrainState, check_same_data, state_of

if TYPE_CHECKING:
    from torch import nn

    from pipelines.worker.engine.batch_statistics import BatchStatistics
    from pipelines.worker.engine.engine import Engine


class Resume(ABC):
    """A saved point of a training."""

    described: Mapping[str, Any]

    @property
    def state(self) -> TrainState:
        """The training's progress at this point."""
        return state_of(self.described)

    @property
    @abstractmethod
    def usage(self) -> Usage:
        """The resources it had used."""

    @property
    def summary(self) -> str:
        """A sentence for the user about where it resumes."""
        state = self.state
        into = f" and {counted(len(state.losses), 'step')} of epoch {state.epoch + 1}" if state.losses else ""
        return f"training resumes after epoch {state.epoch}{into}"

    def placement(self, placement: Placement) -> Placement:
        """The placement to resume with. `compile` "auto" becomes what the training used before."""
        if placement.compile != "auto":
            return placement
        was_compiled = self.described.get("compile", "off")
        # ZeRO 3 cannot be compiled, and a CPU training only is on request.
        can = placement.device == "cuda" and placement.zero_stage < 3
        return placement.model_copy(update={"compile": was_compiled if can else "off"})

    @abstractmethod
    def load_weights(self, model: nn.Module) -> None:
        """Loads the weights into `model`; must run before DeepSpeed partitions them."""

    @abstractmethod
    def restore(self, engine: Engine, statistics: BatchStatistics, checkpoints: Checkpoints) -> None:
        """Restores the rest of the state into the engine. Raises ResumeError if the checkpoint does not fit."""


class FromCheckpoint(Resume):
    """A checkpoint in the current format; resumes on any number of ranks and any ZeRO stage."""

    def __init__(self, found: Found) -> None:
        self.described, self._found = found.described, found

    @property
    def usage(self) -> Usage:
        return read_usage(self._found.files[USAGE])

    def load_weights(self, model: nn.Module) -> None:
        from medmamba.checkpoint import load_state  # imports torch, which the driver avoids

        load_state(model, self._read(WEIGHTS), where=f"checkpoint {self._found.name}")

    def restore(self, engine: Engine, statistics: BatchStatistics, checkpoints: Checkpoints) -> None:
        engine.check_weights(self._read(WEIGHTS))
        try:
            engine.restore(self._read(MOMENTS))
        except ValueError as error:
            raise ResumeError(f"checkpoint {self._found.name}: {error}") from error

    def _read(self, file: str) -> dict[str, Any]:
        from pipelines.worker.engine.snapshot import read_tensors

        try:
            return read_tensors(self._found.files[file])
        except ValueError as error:
            raise ResumeError(f"checkpoint {self._found.name}: {error}") from error


class FromOldCheckpoint(Resume):
    """A checkpoint in the first format; resumes only on the ranks and ZeRO stage that wrote it."""

    def __init__(self, old: OldCheckpoint, folder: Path) -> None:
        self.described, self._folder = old.described, folder

    @property
    def usage(self) -> Usage:
        return read_usage(self._folder / USAGE)

    def placement(self, placement: Placement) -> Placement:
        check_placement(self.described, placement)
        return super().placement(placement).model_copy(update={"flat": self.described.get("flat", False)})

    def load_weights(self, model: nn.Module) -> None:
        pass  # `restore` loads them from DeepSpeed's files

    def restore(self, engine: Engine, statistics: BatchStatistics, checkpoints: Checkpoints) -> None:
        engine.load_old(self._folder / ENGINE)
        statistics.reload()
        if engine.rank == 0:
            checkpoints.keep_model(self.state.best_step, {file: self._folder / BEST / file for file in OF_MODEL})


def find_resume(
    checkpoints: Checkpoints,
    folder: Path,
    manifest: str,
    *,
    training: str,
    say: Callable[[str], None] = lambda text: None,
) -> Resume | None:
    """Finds the point to resume from and fetches its files into `folder`; None if there is no checkpoint.

    Damaged checkpoints are skipped with a line to `say`. Raises ResumeError if none is usable, or if the newest was
    trained on other data than `manifest` or is of another training than `training` (a `training_digest`).
    """
    found = checkpoints.newest(folder, say=say)
    old = None if found else find_old_checkpoint(checkpoints.out)
    if found:
        check_same_data(found.described, manifest)
        if found.described["training"] != training:
            raise ResumeError(
                f"checkpoint {found.name} in {checkpoints.out.uri}/{FOLDER} belongs to another training: its "
                "configuration differs from this run's; delete that folder to train from the beginning, or restore "
                "the right checkpoints"
            )
        return FromCheckpoint(found)
    if old:
        check_same_data(old.described, manifest)
        old.fetch(checkpoints.out, folder)
        return FromOldCheckpoint(old, folder)
    return None
