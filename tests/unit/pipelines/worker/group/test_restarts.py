"""Which ends of a group of workers begin another one."""

from __future__ import annotations

import pytest
import ray
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from data_shards.store import StoreError
from data_shards.store.disk import DiskFullError
from pipelines.cluster.monitor import PREEMPTED, RESIZED
from pipelines.faults import fault_line
from pipelines.group_faults import NoPlaceError, StalledError
from pipelines.worker.group.control import Stopped
from pipelines.worker.group.restarts import kind_of
from pipelines.worker.group.size import Host, best_size, room


def group(**ranks: Exception) -> WorkerGroupError:
    """The error of a group whose ranks failed in these ways."""
    return WorkerGroupError("failed", {int(name[1:]): error for name, error in ranks.items()})


def dead() -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("a worker health check failed", failure=ray.exceptions.ActorDiedError())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (group(r1=dead()), "lost"),
        (group(r0=RuntimeError("Connection closed by peer [10.0.0.2]"), r1=dead()), "lost"),
        (group(r0=RuntimeError("NCCL error: unhandled system error")), "lost"),
        (group(r0=RuntimeError("CUDA error: an illegal memory access was encountered")), "lost"),
        (group(r0=OSError(5, "Input/output error")), "lost"),
        (ControllerError(WorkerGroupStartupFailedError("died")), "lost"),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "waiting"),
        (group(r0=Stopped(RESIZED, 7), r1=Stopped(RESIZED, 7)), "asked"),
        (group(r0=Stopped(PREEMPTED, 7), r1=dead()), "asked"),
        (PreemptionError(PreemptionInfo(None, {"n": [1]}), drain_timed_out=True), "asked"),
        (ControllerError(StalledError("rank 1")), "stalled"),
        (ControllerError(NoPlaceError(2, 600, "1 node")), "final"),
        (group(r1=ValueError("train.optim.lr 9: lower it")), "final"),
        (group(r0=RuntimeError("Connection reset by peer"), r1=ValueError("train.optim.lr 9: lower it")), "final"),
        (group(r0=StoreError("the store is away")), "final"),
        (group(r0=DiskFullError("the disk is full")), "final"),
        (group(r0=RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")), "final"),
        (group(r0=KeyError("x")), "final"),
        (group(r0=AssertionError()), "final"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_passing_failures_are_retried_and_repeating_ones_not(error, kind):
    assert kind_of(error) == kind


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            StalledError("rank 1 (process 7 on node 10.0.0.2) sent no heartbeat for 180 s"),
            "rank 1 (process 7 on node 10.0.0.2) sent no heartbeat for 180 s, and the training stalled: the "
            "process may be stopped, its machine overloaded or its GPU broken; check that node, then run the same "
            "command to resume",
        ),
        (
            NoPlaceError(2, 600, "1 node"),
            "no room for 2 training workers on the nodes of this Ray (1 node) within 10 min: add nodes, or allow fewer "
            "workers (--placement.workers-min), then run the same command to resume",
        ),
    ],
    ids=["stalled", "no place"],
)
def test_a_group_that_cannot_work_is_an_error_with_a_remedy(error, line):
    assert fault_line(ControllerError(error), step="train") == line


def test_workers_fit_where_a_node_has_all_that_one_needs():
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 8.0}]
    assert room(nodes, {"CPU": 1, "GPU": 1}) == 3
    assert room(nodes, {"CPU": 2, "GPU": 0}) == 6
    assert room([{"CPU": 0.9}], {"CPU": 0.3}) == 3
    assert room([], {"CPU": 1}) == 0


def test_the_largest_size_that_fits_and_divides_is_taken():
    assert [best_size(places, [1, 2, 3, 6]) for places in (0, 1, 4, 5, 6, 9)] == [0, 1, 3, 3, 6, 6]


def test_a_host_is_known_by_what_it_has_and_what_is_free():
    host = Host("n", "10.0.0.1", 1, {"CPU": 4.0}, {"CPU": 1.0})
    assert (room([host.total], {"CPU": 2}), room([host.free], {"CPU": 2})) == (2, 0)
