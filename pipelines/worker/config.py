"""What a training is: the model, and how its weights are found. Nothing about where it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_shards.augment_config import AugmentConfig
from medmamba.config import MedMambaConfig, ModelConfig
from medmamba.optim import OptimConfig
from medmamba.precision import Precision


class TrainConfig(BaseModel):
    """How the weights are found (`recipe.train`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: int = Field(10, ge=1)
    """Passes over the training split."""
    batch_size: int = Field(32, ge=1)
    """Images per optimiser step over all workers."""
    micro_batch: int = Field(32, ge=1)
    """Images per forward pass. BatchNorm takes its statistics over exactly these, so it is part of the recipe;
    batch_size must be a multiple of micro_batch x workers."""
    image_size: int = Field(64, ge=32)
    """Side in pixels to which the loader brings every image."""
    precision: Precision = "float32"
    """float32: exact and reproducible. tf32: faster on a GPU, products keep 10 bits of the fraction. bfloat16: matrix
    products and convolutions through torch autocast; weights stay float32. Evaluation is always in float32."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights, the order of samples, drop-path and augmentation."""
    class_weights: bool = False
    """Weigh each class in the loss by the inverse of its frequency in the training split."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """shuffled: each image once an epoch. balanced: each class equally often, images of rare classes several times;
    an epoch stays as long. Not together with class_weights, which would count rare classes twice."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the target probability spread over all classes."""
    patience: int = Field(0, ge=0)
    """Stop after this many epochs without a better validation AUC. 0: never."""
    optim: OptimConfig = OptimConfig()
    """The optimiser and its schedule."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images, drawn on the device."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}; "
                f"change one of them so that it is"
            )
        if self.sampling == "balanced" and self.class_weights:
            raise ValueError(
                "sampling 'balanced' shows rare classes more often and class_weights counts them for more: "
                "use one of the two"
            )
        return self

    def accumulation(self, workers: int) -> int:
        """Forward passes per step on each of `workers`; raises ValueError where they do not divide."""
        if self.batch_size % (self.micro_batch * workers):
            raise ValueError(
                f"train.batch_size {self.batch_size} is no multiple of train.micro_batch {self.micro_batch} x "
                f"{workers} workers; lower micro_batch, raise batch_size, or use another --placement.workers"
            )
        return self.batch_size // (self.micro_batch * workers)


class TrainStepConfig(BaseModel):
    """Identity of a training: `model.*` and `train.*` of a recipe. A sweep's winner overrides these keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: ModelConfig = MedMambaConfig()
    """The network."""
    train: TrainConfig = TrainConfig()
    """How its weights are found."""

    def with_classes(self, num_classes: int) -> TrainStepConfig:
        """The config whose model has an output for each class of the data; ValueError where it asks for another."""
        if self.model.num_classes not in (0, num_classes):
            raise ValueError(
                f"model.num_classes {self.model.num_classes}: the data set has {num_classes} classes, and the network "
                f"needs one output for each; leave it at 0, or give {num_classes}"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"num_classes": num_classes})})
