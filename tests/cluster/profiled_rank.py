"""A training of two epochs: `profiled_rank.py DATASET BATCH_SIZE [FOLDER]`, profiled into FOLDER where that is given.

Prints the losses of its steps, the sha256 of its weights, the figures of its epochs and the summary of its profile.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.optim import OptimConfig
from pipelines.placement import Placement
from pipelines.scratch import scratch
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.checkpoint.usage import USAGE, read_usage
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.launch import train_on_dataset


class Kept:
    """A reporter that keeps everything of interest."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.epochs: list[dict[str, float]] = []
        self.speeds: list[tuple[float, float, float]] = []
        self.weights, self.usage = "", {}
        self.profile: dict[str, Any] = {}

    def progress(self, **values: Any) -> None:
        """After each step."""
        self.speeds.append((values["images_per_s"], values["wait_share"], values["left_s"]))

    def warn(self, text: str) -> None:
        """Nothing is wrong here."""
        raise AssertionError(text)

    def epoch(self, metrics: dict, step_losses: list[float]) -> None:
        """After each epoch."""
        self.losses += step_losses
        self.epochs.append(metrics)


def main() -> None:
    dataset, batch_size, *folder = sys.argv[1:]
    kept = Kept()

    def keep(summary: dict[str, Any], trace: Path) -> None:
        kept.profile = summary
        shutil.copy(trace, folder[0])

    train = TrainConfig(
        epochs=2, batch_size=int(batch_size), micro_batch=2, image_size=32, optim=OptimConfig(lr=1e-3, warmup_epochs=1)
    )
    placement = Placement(
        workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="auto", concurrent_trials=1, nodes=1
    )
    data = (dataset, open_dataset(dataset).digest)
    with scratch("test") as store:
        checkpoints = Checkpoints(open_store(str(store)))
        state = train_on_dataset(
            TrainStepConfig(train=train), placement, data, lambda rank: kept, checkpoints,
            keep_profile=keep if folder else None,
        )  # fmt: skip
        last = checkpoints.newest(store)
        assert last is not None
        kept.weights = hashlib.sha256(last.files["weights.safetensors"].read_bytes()).hexdigest()
        kept.usage = read_usage(last.files[USAGE]).model_dump()
    print(json.dumps({**vars(kept), "history": state.history}))


if __name__ == "__main__":
    main()
