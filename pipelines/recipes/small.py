"""Recipes that a CPU finishes in minutes: the synthetic phantoms and three small real sets."""

from __future__ import annotations

from data_shards.augment_config import AugmentConfig
from data_shards.config import DataConfig
from medmamba.config import MedMambaConfig
from medmamba.optim import OptimConfig
from pipelines.recipes.recipe import Recipe
from pipelines.steps.tune import SearchSpace, TuneConfig
from pipelines.worker.config import TrainConfig


def quickstart() -> Recipe:
    """Synthetic ultrasound phantoms, nano, a sweep of four short trials: the whole chain in minutes on two cores."""
    return Recipe(
        data=DataConfig(dataset="phantoms", samples_per_shard=200),
        model=MedMambaConfig(variant="nano"),
        train=TrainConfig(
            epochs=12,
            batch_size=32,
            micro_batch=16,
            image_size=64,
            optim=OptimConfig(lr=2e-3, weight_decay=0.02, warmup_epochs=1),
            augment=AugmentConfig(hflip=True),
        ),
        tune=TuneConfig(trials=4, epochs=3, space=SearchSpace(batch_size=(16, 32))),
    )


def pneumoniamnist() -> Recipe:
    """PneumoniaMNIST (chest X-ray, 2 classes); needs --data.source pneumoniamnist.npz."""
    return Recipe(data=DataConfig(dataset="pneumoniamnist"))


def breastmnist() -> Recipe:
    """BreastMNIST (breast ultrasound, 2 classes, 780 images); needs --data.source breastmnist.npz."""
    return Recipe(data=DataConfig(dataset="breastmnist"))


def bccd() -> Recipe:
    """Blood cells cut out of smears (3 classes), grouped by smear; needs --data.source bccd_cells.tar."""
    return Recipe(
        data=DataConfig(
            dataset="bccd",
            layout="csv",
            csv="cells.csv",
            image_column="file",
            label_column="label",
            group_column="smear",
        ),  # fmt: skip
    )
