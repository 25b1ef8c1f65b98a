"""The jobs that Ray workers run (a training, a trial of a sweep, an evaluation), and how a training job runs."""

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
    """The default check: no other driver can take over the run."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs. Jobs are pickled to be sent between processes."""

    name: str
    """Subject of its posts to the board: "train", "evaluate", "trial 3/8"."""
    placement: Placement
    dataset: tuple[Store, str]
    """The dataset's folder, and the digest that its manifest must have."""
    board: Any = None
    """The board to post progress to (`cluster.board`); None: do not post."""

    def post(self, **values: Any) -> None:
        """Posts to the board; never raises."""
        post(self.board, self.name, values)

    @contextmanager
    def posting_outages(self) -> Iterator[None]:
        """Inside the block, this process also posts outages of services that it notices."""
        with hear_outages(self.board, self.name):
            yield


@dataclass(frozen=True, kw_only=True)
class TrainJob(Job):
    """A training, or a trial of a sweep."""

    config: TrainStepConfig
    out: Store
    """The folder that its checkpoints are written to."""
    init: str = ""
    """Folder of the initial weights, whose digest is `config.train.init`; empty: random weights."""
    check: Callable[[], None] = _hold_always
    """Raises LostLeaseError once another driver has taken over the run; nothing may be written to it then."""


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(Job):
    """An evaluation on the test split."""

    model: tuple[Store, str]
    """The model's folder, and the digest that its files must have."""
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
    """Runs this rank's part of a training, from its newest checkpoint to the end; returns the final state.

    Args:
        job: The training.
        journal: Records the epochs; only rank 0 uses it.
        control: Requests checkpoints and stops.
        send: Called on every rank with the metrics of each epoch.
        begin: Called first, inside the journal and the control.
        judge: Makes, on rank 0, a function that returns a warning about an epoch's metrics, or "".
        keep_profile: Called on rank 0 with the summary and the trace of a few profiled steps.

    Raises:
        Stopped: `control` ended the training early.
    """
    from pipelines.worker.launch import RayReporter, train_on_dataset

    def reporter(rank: int) -> RayReporter:
        if rank > 0 or judge is None:
            return RayReporter(send, rank, board=job.board, name=job.name)
        return RayReporter(send, rank, board=job.board, name=job.name, judge=judge())

    # `control` ends before `journal`, which may wait for MLflow at the end without showing progress.
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
