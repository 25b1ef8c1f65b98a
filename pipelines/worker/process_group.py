"""How Ray Train's workers become one group of torch.distributed: over the addresses that Ray knows their nodes by."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import ray
import ray.util
import torch.distributed as dist
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from pipelines.worker.network import bind_collectives, listen_on

_meeting: dist.Store | None = None  # rank 0's; it serves the others for as long as the process runs


class NodeTorchConfig(TorchConfig):
    """Ray's own, but that every socket is opened on the node's address where that can be said."""

    @property
    def backend_cls(self) -> type[NodeTorchBackend]:
        """What starts and ends the group."""
        return NodeTorchBackend


class NodeTorchBackend(_TorchBackend):
    """Ray's own would let gloo guess its interface, and rank 0's store listen on all of them without a password."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Brings the workers together; raises what torch raises where they cannot reach each other."""
        assert isinstance(backend_config, TorchConfig)
        config = backend_config
        worker_group.execute(_bind)
        address, port = worker_group.execute_single(0, _open_meeting, len(worker_group))
        worker_group.execute(_set_torch_distributed_env_vars)
        ranks, kind, timeout_s = len(worker_group), config.backend, config.timeout_s
        joined = [
            worker_group.execute_single_async(
                rank, _join, rank, ranks, (address, port), backend=kind, timeout_s=timeout_s
            )
            for rank in range(ranks)
        ]
        ray.get(joined)


def _bind() -> None:
    bind_collectives(ray.util.get_node_ip_address())


def _open_meeting(ranks: int) -> tuple[str, int]:
    """Opens rank 0's store; returns where the other ranks find it. A rank that is alone opens no socket."""
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


def _join(rank: int, ranks: int, meeting: tuple[str, int], *, backend: str, timeout_s: float) -> None:
    address, port = meeting
    # Nothing here reads these; a library may, to learn where the group meets.
    os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port)})
    timeout = timedelta(seconds=timeout_s)
    store = _meeting if rank == 0 else dist.TCPStore(address, port, ranks, is_master=False, timeout=timeout)
    assert store is not None, "rank 0 has not opened its store"
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
