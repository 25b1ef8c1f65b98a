"""One rank that asks its control once a step: `control_rank.py LAG`; rank 0 prints what all of them were told."""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

from pipelines.cluster.monitor import PREEMPTED, Orders
from pipelines.worker.group.control import Control, SharedFlags


class Idle:
    """A writer with nothing to do."""

    is_busy = False


def main() -> None:
    dist.init_process_group("gloo")
    rank, lag = dist.get_rank(), int(sys.argv[1])
    control = Control(rank, SharedFlags(lag=lag), checkpoint_steps=10)
    told, stop, asked_s = [], [0, ""], 0.0
    for step in range(1, 100):
        time.sleep(0.001 * rank)  # ranks are not equally fast
        dist.all_reduce(torch.ones(1))
        if step == 37 and rank == 2:
            control._obey(Orders(PREEMPTED))
        began = time.perf_counter()
        wants = control.wants(step, Idle())
        asked_s += time.perf_counter() - began
        if wants.stop:
            stop = [step, wants.stop]
            break
        if wants.checkpoint:
            told.append(step)
    control._union.close()
    everything: list = [None] * dist.get_world_size()
    dist.all_gather_object(everything, (told, stop))
    if rank == 0:
        same = all(each == everything[0] for each in everything)
        print(json.dumps({"same": same, "checkpoints": told, "stop": stop, "wait_us": 1e6 * asked_s / step}))
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"]
    main()
