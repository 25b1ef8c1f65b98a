"""Two networks, one after another, in a process in which torch may compile a function only once: prints both losses.

torch's own limit is eight; then it runs the function as it is, without an error.
"""

import json

import numpy as np
import torch
import torch._dynamo

from data_shards.loader import MicroBatch
from medmamba.config import ConvNetConfig
from medmamba.model import build_model
from pipelines.placement import Placement
from pipelines.worker.config import TrainConfig
from pipelines.worker.engine.engine import build_engine
from pipelines.worker.engine.objective import Objective
from pipelines.worker.launch import world_of_one

TRAIN = TrainConfig(batch_size=4, micro_batch=4, image_size=32)
PLACEMENT = Placement(
    workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="reference", concurrent_trials=1, nodes=1,
    compile="on", flat=True,
)  # fmt: skip


def batch() -> MicroBatch:
    rows = np.arange(4)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)
    return MicroBatch(images, np.eye(2, dtype=np.uint8)[rows % 2], rows, rows, rows >= 0, epoch=0, consumed=4)


def loss(width: int) -> float:
    """That of the first step of a network of this width."""
    engine = build_engine(build_model(ConvNetConfig(num_classes=2, widths=(width,))), TRAIN, PLACEMENT)
    objective, taken = Objective(TRAIN, "multiclass", None), batch()
    arrays = (taken.images, taken.labels, objective.draws(taken))
    return float(engine.train(objective, *map(torch.from_numpy, arrays)))


if __name__ == "__main__":
    world_of_one(PLACEMENT.backend)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        print(json.dumps([loss(width) for width in (4, 8)]))
