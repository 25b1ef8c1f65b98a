"""How Ray Train's workers become one group of torch.distributed: over the addresses that Ray knows their nodes by.

Ray's own way (`TorchTrainer`) imports torch in the driver and in its controller, which takes 2 s of each, lets gloo
guess its interface, and lets rank 0's store listen on all of them without a password.
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

TIMEOUT_S = 1800  # of a collective
JOIN_S = 300  # until all workers have found each other
END_S = 30  # a group that does not end within this time ends with its processes

_meeting: dist.Store | None = None  # rank 0's; it serves the others for as long as the process runs


@dataclass
class GroupConfig(BackendConfig):
    """Which backend of torch.distributed joins the workers: gloo or nccl."""

    backend: str = "gloo"

    @property
    def backend_cls(self) -> type[Group]:
        """What starts and ends the group."""
        return Group


class Group(Backend):
    """One group of all workers. Every socket is opened on the node's address where that can be said."""

    share_cuda_visible_devices = True  # NCCL needs to see the other ranks' GPUs of the node

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Brings the workers together; raises what torch raises where they cannot reach each other."""
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
    import torch.distributed  # noqa: F401  on all ranks at once, before rank 0 alone opens the store

    bind_collectives(ray.util.get_node_ip_address())
    catch_end()


def _open_meeting(ranks: int) -> tuple[str, int]:
    """Opens rank 0's store; returns where the other ranks find it. A rank that is alone opens no socket."""
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
    assert store is not None, "rank 0 has not opened its store"
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def _tell_libraries(meeting: tuple[str, int]) -> None:
    """Sets what DeepSpeed and others read of a rank's place in the group."""
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
