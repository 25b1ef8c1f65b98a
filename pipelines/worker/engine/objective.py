"""One micro-batch as it is stored -> its loss: all that a training step computes before the gradients.

It is tensors alone, so that torch can compile it and a CUDA graph can hold it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data_shards.loader import MicroBatch
from data_shards.loader.augment import augment_drawn, augment_draws
from medmamba.loss import classification_loss
from medmamba.preprocess import normalise, to_float
from pipelines.worker.config import TrainConfig


class Objective:
    """Augmentation, normalization, the network and the loss of a training recipe.

    Args:
        train: The recipe: augmentation, label smoothing, seed.
        task: See `classification_loss`.
        weights: (C,) weight of each class in the loss, on the device of the training; None: all equal.
    """

    def __init__(self, train: TrainConfig, task: str, weights: torch.Tensor | None) -> None:
        self.train, self.task, self.weights = train, task, weights

    def draws(self, batch: MicroBatch) -> np.ndarray:
        """The random numbers that augmenting this micro-batch takes: (B, n) float32."""
        train = self.train
        return augment_draws(train.augment, seed=train.seed, epoch=batch.epoch, sample=batch.chance)

    def loss(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        images_BHWC: torch.Tensor,
        labels_BC: torch.Tensor,
        draws_Bn: torch.Tensor,
    ) -> torch.Tensor:
        """The mean loss of a micro-batch: uint8 images, multi-hot labels and `draws`, all on the network's device."""
        return self._judged(network(self._prepared(images_BHWC, draws_Bn)), labels_BC)

    def compiled(self, compiler: Callable[..., Any]) -> Objective:
        """The same, with what comes before and after the network compiled by `compiler`."""
        other: Any = copy.copy(self)
        other._prepared, other._judged = compiler(self._prepared), compiler(self._judged)
        return other

    def _prepared(self, images_BHWC: torch.Tensor, draws_Bn: torch.Tensor) -> torch.Tensor:
        """What the network sees: (B, 3, H, W)."""
        return normalise(augment_drawn(to_float(images_BHWC), draws_Bn, self.train.augment))

    def _judged(self, logits_BC: torch.Tensor, labels_BC: torch.Tensor) -> torch.Tensor:
        return classification_loss(
            logits_BC, labels_BC, self.task, weights=self.weights, label_smoothing=self.train.label_smoothing
        )


def autocast(train: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """What the network runs under: torch's autocast where the recipe is in bfloat16, else nothing."""
    if train.precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
