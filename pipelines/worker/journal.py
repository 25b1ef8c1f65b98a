"""What a training keeps of its progress for a record outside: an epoch at a time, and in each checkpoint what is not
known to have arrived there. The loop knows no MLflow; pipelines.tracking.outbox does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self


class Journal:
    """A record that nobody reads. Rank 0 alone keeps one. A context manager: the block is the training."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Closes it; after an error, without waiting for long."""

    def resume(self, history: Iterable[Mapping[str, float]], unsent: Iterable[Mapping[str, Any]] = ()) -> None:
        """Before the first epoch of a training that resumes: completes the record of the epochs before.

        `history` holds the metrics of every finished epoch, `unsent` what `unsent` returned for the checkpoint.
        """

    def epoch(self, metrics: Mapping[str, float], step_losses: Sequence[float]) -> None:
        """Records an epoch: its metrics, among them "epoch" and "step", and the loss of each of its steps."""

    def unsent(self) -> list[dict[str, Any]]:
        """What is not known to be recorded, as JSON, for a checkpoint."""
        return []

    def close(self) -> None:
        """After the last epoch: waits until everything has arrived."""

    def check(self) -> None:
        """Between two steps: raises what the record has failed with for good."""
