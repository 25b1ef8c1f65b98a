"""The interface through which the loop records epochs elsewhere. pipelines.tracking.outbox implements it for MLflow.

Entries that are not known to have arrived are stored in each checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self


class Journal:
    """A journal that records nothing. A context manager around the training; only rank 0 uses one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Closes the journal; after an error, without waiting long."""

    def resume(self, history: Iterable[Mapping[str, float]], unsent: Iterable[Mapping[str, Any]] = ()) -> None:
        """Called before a training resumes: records the earlier epochs that are missing.

        `history` holds the metrics of every finished epoch, `unsent` the entries stored in the checkpoint.
        """

    def epoch(self, metrics: Mapping[str, float], step_losses: Sequence[float]) -> None:
        """Records an epoch: its metrics, including "epoch" and "step", and the loss of each of its steps."""

    def unsent(self) -> list[dict[str, Any]]:
        """Entries that may not be recorded yet, as JSON values for a checkpoint."""
        return []

    def close(self) -> None:
        """Called after the last epoch: waits until everything is recorded."""

    def check(self) -> None:
        """Called between steps: raises the error that recording has failed with permanently, if any."""
