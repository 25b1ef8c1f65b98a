"""Ray Train's scaling policy: how many workers a group gets, and on which nodes.

Ray's own elastic policy uses a node list that is up to 20 s old, ignores that nodes are being drained, and picks sizes
that do not divide the micro-batches. Here a node counts if it is alive, not being drained, and answers; a larger group
starts only after the smaller one has written a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node, state
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)

from pipelines.cluster.board import post
from pipelines.cluster.monitor import RESIZED
from pipelines.group_faults import NoPlaceError

SETTLE_S = 8.0  # resources of an ended group are free again within this time
PLACE_WAIT_S = 600.0  # for a node to come back or an autoscaler to start one
GROW_AFTER_S = 20.0  # least running time before a larger size is considered
LOOK_EVERY_S = 5.0  # room must be seen in two checks in a row
ANSWER_S = 2.0
NOOP_S = 0.2
NODE_ID = "ray.io/node-id"
Resources = Mapping[str, float]


class Host(NamedTuple):
    """A node that workers may be placed on, with its total and free resources."""

    node_id: str
    address: str
    port: int
    total: Resources
    free: Resources


def room(have: Iterable[Resources], each: Resources) -> int:
    """How many workers fit that need `each`."""
    needed = {name: amount for name, amount in each.items() if amount > 0}
    return sum(
        min((math.floor(node.get(name, 0.0) / amount + 1e-6) for name, amount in needed.items()), default=1)
        for node in have
    )


def best_size(places: int, sizes: Collection[int]) -> int:
    """The largest allowed size that fits; 0 if none does."""
    return max((size for size in sizes if size <= places), default=0)


def hosts() -> list[Host]:
    """The nodes that are alive and not being drained."""
    free, draining = available_resources_per_node(), state.get_draining_nodes() or {}
    return [
        Host(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerPort"], node["Resources"],
             free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    ]  # fmt: skip


def answers(host: Host) -> bool:
    """Whether the node's raylet can be reached; Ray takes half a minute to notice that a machine is gone."""
    try:
        socket.create_connection((host.address, host.port), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


class GroupSize(ScalingPolicy):
    """Chooses the largest of `sizes` that fits."""

    def __init__(self, scaling_config: Any, sizes: Sequence[int], board: Any, *, asks_for_nodes: bool) -> None:
        """`asks_for_nodes`: request nodes from the cluster's autoscaler; a single machine has none."""
        super().__init__(scaling_config)
        self._sizes, self._board, self._asks = sorted(sizes), board, asks_for_nodes
        self._each = scaling_config._resources_per_worker_not_none
        self._waiting_since: float | None = None
        self._has_warned = False
        self._looked, self._seen_larger = 0.0, 0
        self._chosen: list[str] = []
        self._first = True

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """See ScalingPolicy. Raises NoPlaceError if even the smallest group finds no room within PLACE_WAIT_S."""
        if self._asks:
            self._maybe_send_resource_request()
        there = [host for host in hosts() if answers(host)]
        free = best_size(room((host.free for host in there), self._each), self._sizes)
        possible = best_size(room((host.total for host in there), self._each), self._sizes)
        now = time.monotonic()
        since = self._waiting_since = now if self._waiting_since is None else self._waiting_since
        # A group of fixed size waits in Ray's own queue if it fits into the cluster's total resources.
        enough = possible if len(self._sizes) == 1 else free
        if now - since > PLACE_WAIT_S:
            raise NoPlaceError(self._sizes[0], PLACE_WAIT_S, _described(there))
        if now - since > SETTLE_S and not self._has_warned and not free:
            self._has_warned = True
            minutes = f"{PLACE_WAIT_S / 60:.0f} min"
            self._say(f"no room for {self._sizes[0]} training workers now; waiting up to {minutes} for nodes")
        if enough == self._sizes[-1] or (enough and (enough == possible or now - since > SETTLE_S)):
            return self._take(enough, there)
        time.sleep(NOOP_S)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """See ScalingPolicy. Never resizes a running group; asks it to stop at a checkpoint instead."""
        if self._asks:
            self._maybe_send_resource_request()
        self._waiting_since, self._has_warned = None, False
        now, current = time.monotonic(), worker_group_state.num_workers
        if (
            current == self._sizes[-1]
            or now - self._looked < LOOK_EVERY_S
            or now - worker_group_state.start_time < GROW_AFTER_S
        ):
            return NoopDecision()
        self._looked = now
        larger = self._larger(worker_group_state.workers)
        if larger > current and larger == self._seen_larger:
            self._say(f"there is room for {larger} workers instead of {current}")
            with contextlib.suppress(Exception):  # broad: without a board the group keeps its size
                ray.get(self._board.ask.remote(RESIZED), timeout=LOOK_EVERY_S)
        self._seen_larger = larger
        return NoopDecision()

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        """See ScalingPolicy. Restricts the workers to the nodes that were counted."""
        return {NODE_ID: f"in({','.join(self._chosen)})"} if self._chosen else None

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """See ScalingPolicy."""
        if self._asks:
            super().after_controller_start(train_run_context)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._sizes[-1]

    def _take(self, size: int, there: Sequence[Host]) -> ResizeDecision:
        self._chosen = [host.node_id for host in there]
        if not self._first or size < self._sizes[-1]:
            workers = f"{size} training worker{'s' if size > 1 else ''} on {_described(there)}"
            post(self._board, "train", {"begin": f"starting {workers}"})
        self._first, self._seen_larger = False, 0
        return ResizeDecision(num_workers=size, resources_per_worker=self._each)

    def _larger(self, workers: Sequence[Any]) -> int:
        """The size that would fit if the group released its own resources."""
        held: dict[str, int] = {}
        for worker in workers:
            held[worker.metadata.node_id] = held.get(worker.metadata.node_id, 0) + 1
        have = [
            {name: host.free.get(name, 0.0) + held.get(host.node_id, 0) * self._each[name] for name in self._each}
            for host in hosts()
        ]
        return best_size(room(have, self._each), self._sizes)

    def _say(self, text: str) -> None:
        post(self._board, "train", {"warning": text})


def _described(there: Sequence[Host]) -> str:
    return f"{len(there)} node{'s' if len(there) != 1 else ''}"
