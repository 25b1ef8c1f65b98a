"""One rank of a training: `rank.py DATASET ZERO_STAGE MICRO_BATCH [flat] [bfloat16]`; rank 0 prints the losses."""

import json
import os
import sys
from tempfile import TemporaryDirectory

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.optim import OptimConfig
from pipelines.placement import Placement
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.launch import train_on_dataset

STEPS = 20


class Losses:
    """A reporter that keeps the losses of all steps."""

    def __init__(self) -> None:
        self.all: list[float] = []

    def progress(self, **values: object) -> None:
        """Nobody looks."""

    def begin(self, what: str) -> None:
        """Nor waits."""

    def warn(self, text: str) -> None:
        """Nothing is wrong here."""
        raise AssertionError(text)

    def epoch(self, metrics: dict, step_losses: list[float]) -> None:
        """Keeps an epoch's losses."""
        self.all += step_losses


def main() -> None:
    dataset, zero_stage, micro_batch, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    data = open_dataset(dataset)
    batch_size = 16
    epochs = -(-STEPS // (len(data.index("train")) // batch_size))
    config = TrainStepConfig(
        train=TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            micro_batch=micro_batch,
            image_size=32,
            precision="bfloat16" if "bfloat16" in options else "float32",
            optim=OptimConfig(lr=1e-3, warmup_epochs=1),
        ),
    )
    ranks = int(os.environ["WORLD_SIZE"])
    placement = Placement(
        workers=ranks, device="cpu", cpus_per_worker=1, zero_stage=zero_stage, scan="auto",
        concurrent_trials=1, nodes=1, flat="flat" in options,
    )  # fmt: skip
    reporter = Losses()
    with TemporaryDirectory() as folder:
        # Only rank 0 writes.
        checkpoints = Checkpoints(open_store(folder))
        train_on_dataset(config, placement, (dataset, data.digest), lambda rank: reporter, checkpoints)
    if os.environ["RANK"] == "0":
        print(json.dumps(reporter.all[:STEPS]))


if __name__ == "__main__":
    main()
