"""One rank of a training in which some steps have a loss that is not a number, as a broken kernel would give it:
`poisoned_rank.py DATASET OUT ZERO_STAGE flat|whole STEPS RANK [STOP]` with STEPS like 3,4 and the RANK that meets it.
With STOP it ends after that step, at a checkpoint.

Prints, as JSON, the losses, the keys of each step's samples, what was said, BatchNorm's buffers, and AdamW's step.
"""

import json
import os
import sys
from typing import Any

import torch

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.optim import OptimConfig
from pipelines.placement import Placement
from pipelines.worker import launch, loop
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.engine.engine import build_engine
from pipelines.worker.engine.objective import Objective
from pipelines.worker.group.control import Stopped, UntilTheEnd, Wants

TRAIN = TrainConfig(epochs=2, batch_size=16, micro_batch=4, image_size=32, optim=OptimConfig(lr=1e-3, warmup_epochs=1))
MICRO_BATCHES = TRAIN.batch_size // TRAIN.micro_batch


class Poisoned(Objective):
    """An objective whose loss is not a number in the last micro-batch that one rank makes of some steps."""

    steps: frozenset[int] = frozenset()
    is_here = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._calls = 0

    def loss(self, *arguments: Any) -> torch.Tensor:
        """See Objective."""
        loss = super().loss(*arguments)
        self._calls += 1
        step, rest = divmod(self._calls, MICRO_BATCHES // int(os.environ["WORLD_SIZE"]))
        return loss * torch.nan if self.is_here and not rest and step in self.steps else loss


class StopsAfter(UntilTheEnd):
    """Ends the training after so many steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def wants(self, step: int, writer: object) -> Wants:
        """See UntilTheEnd."""
        return Wants(stop="enough" if step == self._steps else "")


class Kept:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.metrics: list[dict] = []
        self.said: list[str] = []

    def progress(self, **values: object) -> None:
        """Nobody looks."""

    def begin(self, what: str) -> None:
        """Nor waits."""

    def warn(self, text: str) -> None:
        """Keeps it."""
        self.said.append(text)

    def epoch(self, metrics: dict, step_losses: list[float]) -> None:
        """Keeps an epoch."""
        self.losses += step_losses
        self.metrics.append(metrics)


def main() -> None:
    dataset, out, zero_stage, form, steps, rank, *stop = sys.argv[1:]
    Poisoned.steps = frozenset(int(step) for step in steps.split(","))
    Poisoned.is_here = os.environ["RANK"] == rank
    loop.Objective = Poisoned  # type: ignore[misc]
    engines = []

    def build(*arguments: Any) -> Any:
        engines.append(build_engine(*arguments))
        return engines[-1]

    launch.build_engine = build  # type: ignore[assignment]
    placement = Placement(
        workers=int(os.environ["WORLD_SIZE"]), device="cpu", cpus_per_worker=1, zero_stage=int(zero_stage),
        scan="reference", concurrent_trials=1, nodes=1, flat=form == "flat",
    )  # fmt: skip
    data, kept, error = open_dataset(dataset), Kept(), ""
    try:
        launch.train_on_dataset(
            TrainStepConfig(train=TRAIN), placement, (dataset, data.digest), lambda rank: kept,
            Checkpoints(open_store(out)), control=StopsAfter(int(stop[0])) if stop else None,
        )  # fmt: skip
    except Stopped:
        pass
    except loop.TrainingError as refusal:
        error = str(refusal)
    optimizer = engines[0]._optimizer
    states = (optimizer if zero_stage == "0" else optimizer.optimizer).state
    buffers = {name: value.tolist() for name, value in engines[0].model.named_buffers() if "running" in name}
    print(
        json.dumps(
            {
                "losses": kept.losses,
                "metrics": kept.metrics,
                "said": kept.said,
                "error": error,
                "buffers": buffers,
                "adam_step": [float(state["step"]) for state in states.values()][:1],
            }
        )
    )


if __name__ == "__main__":
    main()
