"""Recipes that a CPU finishes in minutes: the synthetic phantoms and three small real sets."""

from __future__ import annotations

from data_shards.config import DataConfig
from data_shards.loader.augment_config import AugmentConfig
from medmamba.config import MedMambaConfig
from medmamba.optim import OptimConfig
from pipelines.recipes.recipe import Recipe
from pipelines.steps.evaluate import EvaluateConfig
from pipelines.steps.search import SearchSpace, TuneConfig
from pipelines.worker.config import TrainConfig


def quickstart() -> Recipe:
    """Synthetic ultrasound phantoms, nano, a sweep of four short trials: all steps in minutes on two cores."""
    return Recipe(
        data=DataConfig(dataset="phantoms", samples_per_shard=200),
        model=MedMambaConfig(variant="nano"),
        train=TrainConfig(
            epochs=10,
            batch_size=32,
            micro_batch=16,
            image_size=64,
            optim=OptimConfig(lr=2e-3, weight_decay=0.02, warmup_epochs=1),
        ),
        tune=TuneConfig(
            trials=4, epochs=3, space=SearchSpace(lr=(1e-3, 6e-3), weight_decay=(1e-3, 1e-1), batch_size=(16, 32))
        ),
        evaluate=EvaluateConfig(baseline_side=64),  # the same pixels that the network sees
    )


def pneumoniamnist() -> Recipe:
    """PneumoniaMNIST (chest X-ray, 2 classes); needs --data.source pneumoniamnist.npz."""
    return Recipe(
        data=DataConfig(dataset="pneumoniamnist"),
        model=MedMambaConfig(variant="nano"),
        train=TrainConfig(
            epochs=9,
            batch_size=64,
            micro_batch=32,
            image_size=32,
            optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_epochs=1),
            augment=AugmentConfig(hflip=0),  # the heart is on the left
        ),
        tune=TuneConfig(trials=4, epochs=2, space=SearchSpace(lr=(1e-3, 4e-3), weight_decay=(1e-2, 1e-1))),
    )


def breastmnist() -> Recipe:
    """BreastMNIST (breast ultrasound, 2 classes, 780 images); needs --data.source breastmnist.npz."""
    return Recipe(
        data=DataConfig(dataset="breastmnist"),
        model=MedMambaConfig(variant="nano"),
        train=TrainConfig(
            epochs=50,
            batch_size=32,
            micro_batch=32,
            image_size=48,
            optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_epochs=1),
        ),
        # 78 validation images cannot tell a good drop-path from a lucky one: a wide range makes the test AUC a lottery.
        tune=TuneConfig(
            trials=4,
            epochs=9,
            space=SearchSpace(lr=(7e-4, 1.5e-3), weight_decay=(2e-2, 1e-1), drop_path=(0.05, 0.15)),
        ),
    )


def bccd() -> Recipe:
    """Blood cells cut out of smears (3 classes), grouped by smear; needs --data.source bccd_cells.tar."""
    data = DataConfig(
        dataset="bccd",
        layout="table",
        table="cells.csv",
        image_column="file",
        label_column="label",
        group_column="smear",
    )
    return Recipe(
        data=data,
        model=MedMambaConfig(variant="nano"),
        train=TrainConfig(
            epochs=12,
            batch_size=32,
            micro_batch=32,
            image_size=48,
            optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_epochs=1),
            # A cell has no upright orientation. Rotation by less than 90 degrees would only blur it.
            augment=AugmentConfig(hflip=0.5, vflip=0.5, rot90=True, rotate=0),
        ),
        tune=TuneConfig(trials=4, epochs=3, space=SearchSpace(lr=(1e-3, 4e-3), weight_decay=(1e-2, 1e-1))),
        evaluate=EvaluateConfig(baseline_side=16),
    )
