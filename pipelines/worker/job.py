"""What a worker of Ray is handed, and how it runs that: a training, a trial of a sweep or an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.store import Store
from pipelines.cluster.board import hear_outages, post
from pipelines.placement import Placement
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.journal import Journal

if TYPE_CHECKING:
    from pipelines.worker.group.control import UntilTheEnd
    from pipelines.worker.state import TrainState


def _hold_always() -> None:
    """Nobody can take the run over."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs. It travels between processes as a pickle."""

    name: str
    """What its posts on the board are about: "train", "evaluate", "trial 3/8"."""
    placement: Placement
    dataset: tuple[Store, str]
    """The folder of the dataset, and the digest that its manifest must have."""
    board: Any = None
    """Where it posts its progress (`cluster.board`); None: nowhere."""

    def post(self, **values: Any) -> None:
        """Posts to the board; never fails."""
        post(self.board, self.name, values)

    @contextmanager
    def posting_outages(self) -> Iterator[None]:
        """While the block lasts, what this process finds out about services that are away is posted too."""
        with hear_outages(self.board, self.name):
            yield


@dataclass(frozen=True, kw_only=True)
class TrainJob(Job):
    """A training, or a trial of a sweep."""

    config: TrainStepConfig
    out: Store
    """Where its checkpoints are kept."""
    init: str = ""
    """The folder of the weights that `config.train.init` is the digest of; empty: random weights."""
    check: Callable[[], None] = _hold_always
    """Raises LostLeaseError once another driver has taken the run over: this one must not write to it any more."""


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(Job):
    """An evaluation on the test split."""

    model: tuple[Store, str]
    """The folder of the model, and the digest that its files must have."""
    micro_batch: int


def run_job(
    job: TrainJob,
    journal: Journal,
    control: UntilTheEnd,
    *,
    send: Callable[[dict[str, float]], None] = lambda metrics: None,
    begin: Callable[[], None] = lambda: None,
    judge: Callable[[], Callable[[dict[str, float]], str]] | None = None,
    keep_profile: Callable[[dict[str, Any], Path], None] | None = None,
) -> TrainState:
    """Runs this rank's part of a training to its end, from its newest checkpoint on; returns the final state.

    `begin` is called first. Every rank hands the metrics of each epoch to `send`. `judge` makes, on rank 0, what
    returns a warning about them; `keep_profile` gets what rank 0 has profiled. Raises Stopped where `control` ends the
    training early.
    """
    from pipelines.worker.launch import RayReporter, train_on_dataset

    def reporter(rank: int) -> RayReporter:
        if rank > 0 or judge is None:
            return RayReporter(send, rank, board=job.board, name=job.name)
        return RayReporter(send, rank, board=job.board, name=job.name, judge=judge())

    # While the journal waits for MLflow at the end, nobody expects progress of the rank any more.
    with job.posting_outages(), journal, control:
        begin()
        return train_on_dataset(
            job.config,
            job.placement,
            job.dataset,
            reporter,
            Checkpoints(job.out, check=job.check),
            journal=journal,
            init=job.init,
            keep_profile=keep_profile,
            control=control,
        )
