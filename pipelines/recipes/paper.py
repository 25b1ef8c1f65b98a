"""The published recipes (arXiv 2403.03849): MedMamba-T at 224 px, for GPUs."""

from __future__ import annotations

from data_shards.config import DataConfig
from data_shards.loader.augment_config import AugmentConfig
from medmamba.config import MedMambaConfig
from medmamba.optim import OptimConfig
from pipelines.recipes.recipe import Recipe
from pipelines.steps.search import SearchSpace, TuneConfig
from pipelines.worker.config import TrainConfig

# The paper does not mention augmentation.
NO_AUGMENTATION = AugmentConfig(hflip=0, translate=0, scale=0, rotate=0, brightness=0, contrast=0)


def paper_medmnist() -> Recipe:
    """MedMamba-T as published for the MedMNIST sets: 100 epochs, batch 128, lr 1e-3, x0.1 at epochs 50 and 75."""
    return Recipe(
        data=DataConfig(dataset="bloodmnist"),
        model=MedMambaConfig(variant="T"),
        train=TrainConfig(
            epochs=100,
            batch_size=128,
            micro_batch=32,  # the paper's four GPUs saw 32 images each
            image_size=224,
            precision="bfloat16",
            augment=NO_AUGMENTATION,
            optim=OptimConfig(lr=1e-3, weight_decay=1e-2, schedule="step", milestones=(50, 75), clip_norm=0),
        ),
    )


def paper() -> Recipe:
    """MedMamba-T as published for the other six sets: AdamW 1e-4 constant, 150 epochs, batch 64, early stopping."""
    return Recipe(
        data=DataConfig(dataset="kvasir"),
        model=MedMambaConfig(variant="T"),
        train=TrainConfig(
            epochs=150,
            batch_size=64,
            micro_batch=16,
            image_size=224,
            precision="bfloat16",
            patience=20,  # the paper stops early but does not say after how many epochs
            augment=NO_AUGMENTATION,
            optim=OptimConfig(lr=1e-4, weight_decay=1e-4, schedule="constant", clip_norm=0),
        ),
        tune=TuneConfig(space=SearchSpace(lr=(3e-5, 1e-3))),  # around the published rate
    )
