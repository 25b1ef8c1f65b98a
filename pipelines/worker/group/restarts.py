"""Ray Train's failure policy: decides which failures restart the worker group.

A lost worker, a lost node or a stalled rank restarts the group from the newest checkpoint, as long as restarts make
progress. Failures that would repeat (a user's mistake, non-finite numbers, a full GPU or disk) do not.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, Literal

import ray
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from pipelines.cluster.board import post
from pipelines.cluster.monitor import PREEMPTED, RESIZED, Limits, Loss, Member, loss_line
from pipelines.faults import causes, comes_again
from pipelines.group_faults import NoPlaceError, StalledError
from pipelines.worker.group.control import Stopped

RESTARTS = 3  # in a row without a newer checkpoint
STALLS = 1
LOOK_S = 1.0
ANSWER_S = 10.0
Kind = Literal["asked", "waiting", "lost", "stalled", "final"]
# torch raises these on a rank whose peer is gone, often before Ray notices.
_PEER_LOST = ("DistBackendError", "DistNetworkError", "Connection closed by peer", "Connection reset by peer", "NCCL")
SAYS = {RESIZED: "the number of workers changes", PREEMPTED: "a node will be preempted"}


def kind_of(error: BaseException) -> Kind:
    """Classifies why a group ended.

    Returns "asked" (a requested stop), "waiting" (no room yet), "lost" (a worker or node was lost), "stalled" (a rank
    made no progress) or "final" (the error would repeat).
    """
    chain = list(causes(error))
    if any(isinstance(each, Stopped) for each in chain) or isinstance(error, PreemptionError):
        return "asked"
    if any(isinstance(each, StalledError) for each in chain):
        return "stalled"
    if any(isinstance(each, NoPlaceError) for each in chain) or comes_again(error):
        return "final"
    lost = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError, ray.exceptions.RayActorError)
    if any(isinstance(each, lost) for each in chain):
        return "lost"
    text = "\n".join(f"{type(each).__name__}: {each}" for each in chain)
    if any(sign in text for sign in _PEER_LOST):
        return "lost"
    startup = error.controller_failure if isinstance(error, ControllerError) else None
    if isinstance(startup, WorkerGroupStartupTimeoutError):
        return "waiting"  # the scaling policy limits the time
    if isinstance(startup, WorkerGroupStartupFailedError):
        return "lost"
    # Device and driver failures come as one of these types; a defect in this code usually does not.
    innermost = chain[-1]
    return "lost" if isinstance(innermost, (RuntimeError, OSError)) else "final"


class RestartPolicy(FailurePolicy):
    """Restarts the group where that can help and reports it; the count resets at a newer checkpoint."""

    def __init__(self, board: Any, *, gpus: bool) -> None:
        super().__init__(FailureConfig())
        self._board, self._gpus = board, gpus
        self._restarts = self._stalls = 0
        self._saved_step = -1

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """See FailurePolicy."""
        kind, loss = kind_of(training_failed_error), self._loss()
        if kind == "asked":
            self._say(_asked_line(training_failed_error, loss, gpus=self._gpus))
            return FailureDecision.RETRY
        if kind == "waiting":
            return FailureDecision.RETRY
        if kind == "final":
            return FailureDecision.RAISE
        if loss.saved_step > self._saved_step:
            self._restarts = self._stalls = 0
            self._saved_step = loss.saved_step
        self._restarts, self._stalls = self._restarts + 1, self._stalls + (kind == "stalled")
        if self._restarts > RESTARTS or self._stalls > STALLS:
            return FailureDecision.RAISE
        tried = f"restart {self._restarts} of {RESTARTS} before the next checkpoint"
        self._say(f"{_what_happened(training_failed_error)}; {loss_line(loss, gpus=self._gpus)}; {tried}")
        return FailureDecision.RETRY

    def _loss(self) -> Loss:
        with contextlib.suppress(Exception):  # broad: the board may be lost with the group
            return ray.get(self._board.loss.remote(), timeout=ANSWER_S)
        return Loss()

    def _say(self, text: str) -> None:
        post(self._board, "train", {"warning": text})


class GroupWatch(WorkerGroupCallback):
    """Reports the group's members to the board, and ends a group that has stalled."""

    def __init__(self, board: Any, limits: Limits) -> None:
        self._board, self._limits = board, limits
        self._looked = 0.0
        self._workers: list[Any] = []

    def after_worker_group_start(self, worker_group: Any) -> None:
        """See WorkerGroupCallback."""
        self._workers = worker_group.get_workers()
        members = [Member(w.distributed_context.world_rank, w.metadata.node_ip, w.metadata.pid) for w in self._workers]
        with contextlib.suppress(Exception):  # broad: the training works without a board
            ray.get(self._board.begin_group.remote(members), timeout=ANSWER_S)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """See WorkerGroupCallback. If a rank has stalled, kills the group's workers and raises StalledError."""
        now = time.monotonic()
        if now - self._looked < LOOK_S or worker_group_status.errors or worker_group_status.finished:
            return
        self._looked, who = now, ""
        with contextlib.suppress(Exception):  # broad: without a board nothing is known to have stalled
            who = ray.get(self._board.stalled.remote(self._limits), timeout=ANSWER_S)
        if who:
            for worker in self._workers:  # a stalled group cannot shut down in order
                ray.kill(worker.actor)
            raise StalledError(who)


def _asked_line(error: BaseException, loss: Loss, *, gpus: bool) -> str:
    stopped = next((each for each in causes(error) if isinstance(each, Stopped)), None)
    if stopped is None:
        return f"a node was preempted before a checkpoint was complete; {loss_line(loss, gpus=gpus)}"
    kept = loss._replace(steps=0, seconds=0.0) if loss.saved_step >= stopped.step else loss
    return f"{SAYS.get(stopped.reason, stopped.reason)}: checkpoint of step {stopped.step} written; " + loss_line(
        kept, gpus=gpus
    )


def _what_happened(error: BaseException) -> str:
    """A short description of the failure, for the user."""
    chain = list(causes(error))
    stalled = next((each for each in chain if isinstance(each, StalledError)), None)
    if stalled is not None:
        return stalled.who
    failures = getattr(error, "worker_failures", {}) if isinstance(error, WorkerGroupError) else {}
    dead = [rank for rank, each in failures.items() if isinstance(each, WorkerHealthCheckFailedError)]
    if dead:
        return f"rank {', '.join(map(str, sorted(dead)))} was lost (its process or node was killed or crashed)"
    if isinstance(error, ControllerError):
        return "the workers did not start"
    first = next(iter(failures.values()), error)
    lines = str(first).strip().splitlines() or [type(first).__name__]
    return f"rank {min(failures, default=0)} lost contact with the others ({type(first).__name__}: {lines[-1][:120]})"
