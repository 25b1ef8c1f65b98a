"""Trials in one process, one after another, as an actor that Tune uses again runs them: `trials.py DATASET LR...`.

Prints, as JSON, the loss of each step of the last trial, its validation metrics, and how many networks are left.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.config import MedMambaConfig
from medmamba.optim import OptimConfig
from pipelines.placement import Placement
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.launch import train_on_dataset, world_of_one


class Kept:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.metrics: list[dict] = []

    def progress(self, **values: object) -> None:
        """Nobody looks."""

    def warn(self, text: str) -> None:
        """Nothing is wrong here."""
        raise AssertionError(text)

    def epoch(self, metrics: dict, step_losses: list[float]) -> None:
        """Keeps an epoch."""
        self.losses += step_losses
        self.metrics.append({key: value for key, value in metrics.items() if key.startswith(("train_", "val_"))})


def trial(dataset: str, lr: float, folder: Path) -> Kept:
    """Trains a network of its own with this learning rate."""
    kept = Kept()
    config = TrainStepConfig(
        model=MedMambaConfig(variant="nano", drop_path=0.2),
        train=TrainConfig(epochs=2, batch_size=16, micro_batch=8, image_size=32, optim=OptimConfig(lr=lr)),
    )
    placement = Placement(
        workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="reference", concurrent_trials=1, nodes=1
    )
    world_of_one(placement.backend)
    checkpoints = Checkpoints(open_store(str(folder)))
    train_on_dataset(config, placement, (dataset, open_dataset(dataset).digest), lambda rank: kept, checkpoints)
    return kept


def main() -> None:
    dataset, folder, *rates = sys.argv[1:]
    for number, rate in enumerate(rates):
        kept = trial(dataset, float(rate), Path(folder) / str(number))
        gc.collect()
    networks = sum(isinstance(each, torch.nn.BatchNorm2d) for each in gc.get_objects())
    print(json.dumps({"losses": kept.losses, "metrics": kept.metrics, "left": networks}))


if __name__ == "__main__":
    main()
