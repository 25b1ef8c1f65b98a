"""What a training is: the model, and how its weights are found. Nothing about where it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_shards.loader.augment_config import AugmentConfig
from medmamba.config import MedMambaConfig, ModelConfig
from medmamba.optim import OptimConfig
from medmamba.precision import Precision
from pipelines.wording import counted


class TrainConfig(BaseModel):
    """How the weights are found (`recipe.train`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: int = Field(10, ge=1)
    """Passes over the training split."""
    batch_size: int = Field(32, ge=1)
    """Images per optimizer step over all workers."""
    micro_batch: int = Field(32, ge=1)
    """Images per forward pass. BatchNorm takes its statistics over exactly these, so it is part of the recipe;
    batch_size must be a multiple of micro_batch x workers."""
    image_size: int = Field(64, ge=32, le=4096)
    """Side in pixels to which the loader brings every image."""
    precision: Precision = "float32"
    """float32: exact and reproducible. tf32: faster on a GPU, products keep 10 bits of the fraction. bfloat16: matrix
    products and convolutions through torch autocast; weights stay float32. Evaluation is always in float32."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights, the order of samples, drop-path and augmentation."""
    init: str = ""
    """Weights to start from: a folder with weights.safetensors and model.json (also one of the store, as in
    runs/RUN/train/model), a checkpoint of the paper's code (.pth), models:/NAME@ALIAS or models:/NAME/VERSION. Where
    the classes differ, the head is new. Empty: random weights."""
    freeze: tuple[str, ...] = ()
    """Parameters that keep the values of init, by patterns on their names (patch_embed.* 'layers.0.*')."""
    class_weights: bool = False
    """Weigh each class in the loss by the inverse of its frequency in the training split."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """shuffled: each image once an epoch. balanced: each class equally often, images of rare classes several times;
    an epoch keeps its length. Not together with class_weights, which would count rare classes twice."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the target probability spread over all classes."""
    patience: int = Field(0, ge=0)
    """Stop after this many epochs without a better validation AUC. 0: never."""
    optim: OptimConfig = OptimConfig()
    """The optimizer and its schedule."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images, drawn on the device."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}; "
                f"change one of them so that it is"
            )
        if self.freeze and not self.init:
            raise ValueError(
                f"freeze {' '.join(self.freeze)} without init would freeze random weights: name the weights to start "
                "from (train.init), or freeze nothing"
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
                f"train.batch_size {self.batch_size} is not a multiple of train.micro_batch {self.micro_batch} x "
                f"{counted(workers, 'worker')}; lower micro_batch, raise batch_size, or use another --placement.workers"
            )
        return self.batch_size // (self.micro_batch * workers)

    def sizes(self, least: int, most: int) -> list[int]:
        """The numbers of workers from `least` to `most` among which a step's micro-batches can be shared evenly."""
        micro_batches = self.accumulation(1)
        return [workers for workers in range(least, most + 1) if micro_batches % workers == 0]


class TrainStepConfig(BaseModel):
    """Identity of a training: `model.*` and `train.*` of a recipe. A sweep's winner overrides these keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: ModelConfig = MedMambaConfig()
    """The network."""
    train: TrainConfig = TrainConfig()
    """How its weights are found."""

    @model_validator(mode="after")
    def _maps_are_large_enough(self) -> TrainStepConfig:
        size, micro_batch = self.train.image_size, self.train.micro_batch
        side = self.model.last_side(size)
        if side < 1:
            raise ValueError(
                f"train.image_size {size}: every stage of the network halves the image, and nothing is left for the "
                f"last one; use at least {self.model.least_image_size(1)}, or a network of fewer stages"
            )
        # torch refuses this in the middle of a training: one value has no variance.
        if micro_batch * side * side == 1 and self.model.normalises_batches:
            raise ValueError(
                f"train.image_size {size} with train.micro_batch {micro_batch}: BatchNorm needs more than one value "
                f"per channel, and the last stage's maps are 1 x 1; use train.image_size "
                f"{self.model.least_image_size(2)} or more, or train.micro_batch 2 or more"
            )
        return self

    def with_classes(self, num_classes: int) -> TrainStepConfig:
        """The config whose model has an output for each class of the data; ValueError where it asks for another."""
        if self.model.num_classes not in (0, num_classes):
            raise ValueError(
                f"model.num_classes {self.model.num_classes}: the data set has {num_classes} classes, and the network "
                f"needs one output for each; leave it at 0, or give {num_classes}"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"num_classes": num_classes})})
