"""One rank of a training: `resumed_rank.py DATASET ZERO_STAGE flat|whole FOLDER [CHECKPOINT]`.

Saves its share of each epoch's checkpoint below FOLDER, as Ray Train would upload it, and goes on from CHECKPOINT.
Prints what validation found after each epoch as JSON.
"""

import json
import os
import sys
from pathlib import Path

from data_shards.manifest import open_dataset
from medmamba.optim import OptimConfig
from pipelines.placement import Placement
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.launch import train_on_dataset

TRAIN = TrainConfig(epochs=3, batch_size=8, micro_batch=4, image_size=32, optim=OptimConfig(lr=2e-3, warmup_epochs=1))


class Saver:
    """A reporter that saves this rank's share of each epoch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def progress(self, **values: object) -> None:
        """Nobody looks."""

    def begin(self, what: str) -> None:
        """Nor waits."""

    def epoch(self, metrics: dict, step_losses: list[float], save) -> None:
        """Saves below `folder`/epoch/rank."""
        share = self._folder / str(metrics["epoch"]) / os.environ["RANK"]
        share.mkdir(parents=True)
        save(share)


def main() -> None:
    dataset, zero_stage, form, folder, *checkpoint = sys.argv[1:]
    placement = Placement(
        workers=int(os.environ["WORLD_SIZE"]), device="cpu", cpus_per_worker=1, zero_stage=int(zero_stage), scan="auto",
        trials=1, nodes=1, flat=form == "flat",
    )  # fmt: skip
    state = train_on_dataset(
        TrainStepConfig(train=TRAIN),
        placement,
        (dataset, open_dataset(dataset).digest),
        lambda rank: Saver(Path(folder)),
        Path(checkpoint[0]) if checkpoint else None,
    )
    print(json.dumps([{k: v for k, v in epoch.items() if k.startswith("val_")} for epoch in state.history]))


if __name__ == "__main__":
    main()
