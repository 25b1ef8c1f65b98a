"""Joins Ray Train's workers into one torch.distributed group, over the node addresses that Ray uses.

Ray's `TorchTrainer` imports torch in the driver and in its controller (2 s each), lets gloo guess its interface, and
opens rank 0's store on all interfaces without a password.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.util
from ray.train.backend import Backend, BackendConfig

from pipelines.worker.group.network import bind_collectives, listen_on
from pipelines.worker.group.stop_flag import catch_end

if TYPE_CHECKING:
    import torch.distributed as dist

TIMEOUT_S = 1800  # for one collective
JOIN_S = 300  # for all workers to connect
END_S = 30  # after this the group is left to end with its processes

_meeting: dist.Store | None = None  # rank 0's store; it must live as long as the process


@dataclass
class GroupConfig(BackendConfig):
    """The torch.distributed backend that joins the workers: gloo or nccl."""

    backend: str = "gloo"

    @property
    def backend_cls(self) -> type[Group]:
        """The class that starts and ends the group."""
        return Group


class Group(Backend):
    """One group of all workers. Sockets are bound to the node's address where possible."""

    share_cuda_visible_devices = True  # NCCL needs to see the GPUs of the node's other ranks

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Connects the workers; raises torch's errors if they cannot reach each other."""
        assert isinstance(backend_config, GroupConfig)
        ray.get(worker_group.execute_async(_bind), timeout=JOIN_S)
        address, port = worker_group.execute_single(0, _open_meeting, len(worker_group))
        ranks, kind = len(worker_group), backend_config.backend
        joined = [
            worker_group.execute_single_async(rank, _join, rank, ranks, (address, port), backend=kind)
            for rank in range(ranks)
        ]
        ray.get(joined, timeout=JOIN_S)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Ends the group on every worker."""
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=END_S)


def _bind() -> None:
    import torch.distributed  # noqa: F401  (on all ranks in parallel, before only rank 0 opens the store)

    bind_collectives(ray.util.get_node_ip_address())
    catch_end()


def _open_meeting(ranks: int) -> tuple[str, int]:
    """Opens rank 0's store; returns its (address, port). A single rank opens no socket and returns port 0."""
    import torch.distributed as dist

    global _meeting
    address = ray.util.get_node_ip_address()
    if ranks == 1:
        _meeting = dist.HashStore()
        return address, 0
    listening = listen_on(address)
    port = listening.getsockname()[1]
    _meeting = dist.TCPStore(
        address, port, ranks, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    return address, port


def _join(rank: int, ranks: int, meeting: tuple[str, int], *, backend: str) -> None:
    import torch.distributed as dist

    _tell_libraries(meeting)
    address, port = meeting
    timeout = timedelta(seconds=TIMEOUT_S)
    store = _meeting if rank == 0 else dist.TCPStore(address, port, ranks, is_master=False, timeout=timeout)
    assert store is not None, "rank 0 must open its store before it joins"
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def _tell_libraries(meeting: tuple[str, int]) -> None:
    """Sets the environment variables that DeepSpeed and others read about the rank and its group."""
    place = ray.train.get_context()
    numbers = {
        "RANK": place.get_world_rank(),
        "WORLD_SIZE": place.get_world_size(),
        "LOCAL_RANK": place.get_local_rank(),
        "LOCAL_WORLD_SIZE": place.get_local_world_size(),
        "NODE_RANK": place.get_node_rank(),
    }
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update({"MASTER_ADDR": meeting[0], "MASTER_PORT": str(meeting[1])})


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
