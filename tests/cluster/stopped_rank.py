"""One rank of a training that is ended early: `stopped_rank.py DATASET OUT ZERO_STAGE WHEN`.

WHEN is "validation": a stop is asked for as soon as the validation of the first epoch begins; "checkpoint": only a
checkpoint is, in each validation; "record": rank 0's record of the epochs fails for good after step 2; "never".
Prints, as JSON, how the rank ended, and its validation batches.
"""

import json
import os
import sys
from contextlib import AbstractContextManager

import torch.distributed as dist

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.config import MedMambaConfig
from medmamba.optim import OptimConfig
from pipelines.cluster.monitor import INTERRUPTED
from pipelines.placement import Placement
from pipelines.tracking.client import PatienceError
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.group.control import BITS, CHECKPOINT, Control, OwnFlags, SharedFlags, Stopped
from pipelines.worker.job import TrainJob, run_job
from pipelines.worker.journal import Journal

CONFIG = TrainStepConfig(
    model=MedMambaConfig(variant="nano"),
    train=TrainConfig(epochs=2, batch_size=8, micro_batch=4, image_size=32, optim=OptimConfig(lr=1e-3)),
)


class AsksInValidation(Control):
    """Is asked for something when a validation begins."""

    asks = 0
    batches = 0

    def busy(self, doing: str) -> AbstractContextManager[None]:
        """See Control."""
        if self.asks and doing == "validating":
            self._set(self.asks)
        return super().busy(doing)

    def counted(self, work):
        """Counts the batches of validations."""

        def call(*given):
            self.batches += 1
            return work(*given)

        return super().counted(call)


class Fails(Journal):
    """A record that fails for good once it was asked so often."""

    def __init__(self, after: int) -> None:
        self.left = after

    def check(self) -> None:
        """See Journal."""
        self.left -= 1
        if self.left < 0:
            raise PatienceError("MLflow was away for too long")


def main() -> None:
    dataset, out, zero_stage, when = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    job = TrainJob(
        name="train",
        placement=Placement(
            workers=ranks, device="cpu", cpus_per_worker=1, zero_stage=int(zero_stage), scan="reference",
            concurrent_trials=1, nodes=1,
        ),
        dataset=(open_store(dataset), open_dataset(dataset).digest),
        config=CONFIG,
        out=open_store(out),
    )  # fmt: skip
    control = AsksInValidation(rank, SharedFlags() if ranks > 1 else OwnFlags())
    control.asks = {"validation": BITS[INTERRUPTED], "checkpoint": CHECKPOINT}.get(when, 0)
    journal = Fails(2) if when == "record" and rank == 0 else Journal()
    ended = "end"
    try:
        run_job(job, journal, control)
    except Stopped as stopped:
        ended = stopped.reason
    except PatienceError as error:
        ended = str(error)
    described = Checkpoints(job.out).newest_state() or {}
    fields = {name: described.get(name) for name in ("step", "epoch", "losses", "digests", "history")}
    print(json.dumps({"ended": ended, "batches": control.batches, **fields}))


if __name__ == "__main__":
    main()
