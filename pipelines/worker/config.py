"""The configuration of a training: the network and how it is trained, independent of where it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_shards.loader.augment_config import AugmentConfig
from medmamba.config import MedMambaConfig, ModelConfig
from medmamba.optim import OptimConfig
from medmamba.precision import Precision
from pipelines.wording import counted


class TrainConfig(BaseModel):
    """How the network is trained (`recipe.train`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: int = Field(10, ge=1)
    """Passes over the training split."""
    batch_size: int = Field(32, ge=1)
    """Images per optimizer step, summed over all workers."""
    micro_batch: int = Field(32, ge=1)
    """Images per forward pass. BatchNorm computes its statistics over one micro-batch, so this is part of the recipe;
    batch_size must be a multiple of micro_batch x workers."""
    image_size: int = Field(64, ge=32, le=4096)
    """Side length in pixels to which the loader resizes every image."""
    precision: Precision = "float32"
    """float32: exact and reproducible. tf32: faster on a GPU; products keep 10 bits of the fraction. bfloat16: matrix
    products and convolutions run under torch autocast, weights stay float32. Evaluation always uses float32."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights, the order of samples, drop-path and augmentation."""
    init: str = ""
    """Weights to start from: a folder with weights.safetensors and model.json (local or in the store, such as
    runs/RUN/train/model), a checkpoint of the paper's code (.pth), models:/NAME@ALIAS or models:/NAME/VERSION. If the
    classes differ, the head is reinitialized. Empty: random weights."""
    freeze: tuple[str, ...] = ()
    """Parameters to keep at their init values, as patterns on their names (patch_embed.* 'layers.0.*')."""
    class_weights: bool = False
    """Weight each class in the loss by the inverse of its frequency in the training split."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """shuffled: each image once per epoch. balanced: each class equally often, so images of rare classes repeat; the
    epoch length is unchanged. Cannot be combined with class_weights, which would correct for rarity twice."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Fraction of the target probability spread over all classes."""
    patience: int = Field(0, ge=0)
    """Stop after this many epochs without a better validation AUC. 0: never stop early."""
    optim: OptimConfig = OptimConfig()
    """The optimizer and its schedule."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images, applied on the device."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}; change one of them"
            )
        if self.freeze and not self.init:
            raise ValueError(
                f"freeze {' '.join(self.freeze)} without init would freeze random weights; set train.init to the "
                "weights to start from, or clear train.freeze"
            )
        if self.sampling == "balanced" and self.class_weights:
            raise ValueError(
                "sampling 'balanced' and class_weights both compensate for rare classes and cannot be combined; "
                "use one of them"
            )
        return self

    def accumulation(self, workers: int) -> int:
        """Forward passes per step on each of `workers`. Raises ValueError if batch_size does not divide evenly."""
        if self.batch_size % (self.micro_batch * workers):
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of train.micro_batch {self.micro_batch} x "
                f"{counted(workers, 'worker')}; lower micro_batch, raise batch_size, or use another --placement.workers"
            )
        return self.batch_size // (self.micro_batch * workers)

    def sizes(self, least: int, most: int) -> list[int]:
        """Worker counts from `least` to `most` that divide a step's micro-batches evenly."""
        micro_batches = self.accumulation(1)
        return [workers for workers in range(least, most + 1) if micro_batches % workers == 0]


class TrainStepConfig(BaseModel):
    """What identifies a training: `model.*` and `train.*` of a recipe. A sweep's winner overrides these keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: ModelConfig = MedMambaConfig()
    """The network."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""

    @model_validator(mode="after")
    def _maps_are_large_enough(self) -> TrainStepConfig:
        size, micro_batch = self.train.image_size, self.train.micro_batch
        side = self.model.last_side(size)
        if side < 1:
            raise ValueError(
                f"train.image_size {size} is too small: every stage of the network halves the image; use at least "
                f"{self.model.least_image_size(1)}, or a network with fewer stages"
            )
        # A single value has no variance; torch would only raise in the middle of the training.
        if micro_batch * side * side == 1 and self.model.normalizes_batches:
            raise ValueError(
                f"train.image_size {size} with train.micro_batch {micro_batch}: BatchNorm needs more than one value "
                f"per channel, and the last stage's maps are 1 x 1; use train.image_size "
                f"{self.model.least_image_size(2)} or more, or train.micro_batch 2 or more"
            )
        return self

    def with_classes(self, num_classes: int) -> TrainStepConfig:
        """This config with `num_classes` model outputs. Raises ValueError if model.num_classes is set to another."""
        if self.model.num_classes not in (0, num_classes):
            raise ValueError(
                f"model.num_classes is {self.model.num_classes}, but the dataset has {num_classes} classes; leave it "
                f"at 0 or set it to {num_classes}"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"num_classes": num_classes})})
