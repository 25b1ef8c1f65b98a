"""One of two ranks on different hosts: `meeting_rank.py RANK OWN_ADDRESS FIRST_ADDRESS PORT BIND`; prints their sum."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from pipelines.worker.group.network import bind_collectives


def main() -> None:
    rank, own, first, port, bind = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
    if bind == "bind":
        bind_collectives(own)
    timeout = timedelta(seconds=8)
    store = dist.TCPStore(first, port, 2, is_master=rank == 0, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    print(total.item())
    dist.barrier()


if __name__ == "__main__":
    main()
