"""Computes the loss of a stored micro-batch: everything in a training step before the gradients.

It works on tensors only, so that torch can compile it and a CUDA graph can capture it.
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
from medmamba.preprocess import normalize, to_float
from pipelines.worker.config import TrainConfig


class Objective:
    """Augmentation, normalization, the network and the loss of a training recipe.

    Args:
        train: The recipe: augmentation, label smoothing, seed.
        task: See `classification_loss`.
        weights: (C,) weight of each class in the loss, on the training device; None: all equal.
    """

    def __init__(self, train: TrainConfig, task: str, weights: torch.Tensor | None) -> None:
        self.train, self.task, self.weights = train, task, weights

    def draws(self, batch: MicroBatch) -> np.ndarray:
        """The random numbers for augmenting this micro-batch: (B, n) float32."""
        train = self.train
        return augment_draws(train.augment, seed=train.seed, epoch=batch.epoch, sample=batch.chance)

    def loss(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        images_BHWC: torch.Tensor,
        labels_BC: torch.Tensor,
        draws_Bn: torch.Tensor,
    ) -> torch.Tensor:
        """Mean loss of a micro-batch (a scalar): uint8 images, multi-hot labels and `draws`, all on the same device."""
        return self._scored(network(self._prepared(images_BHWC, draws_Bn)), labels_BC)

    def compiled(self, compiler: Callable[..., Any]) -> Objective:
        """A copy whose steps before and after the network are compiled by `compiler`."""
        other = copy.copy(self)
        other._prepared = compiler(self._prepared)  # type: ignore[method-assign]
        other._scored = compiler(self._scored)  # type: ignore[method-assign]
        return other

    def _prepared(self, images_BHWC: torch.Tensor, draws_Bn: torch.Tensor) -> torch.Tensor:
        """The network's input, (B, 3, H, W)."""
        return normalize(augment_drawn(to_float(images_BHWC), draws_Bn, self.train.augment))

    def _scored(self, logits_BC: torch.Tensor, labels_BC: torch.Tensor) -> torch.Tensor:
        return classification_loss(
            logits_BC, labels_BC, self.task, weights=self.weights, label_smoothing=self.train.label_smoothing
        )


def autocast(train: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context to run the network in: torch's autocast if the recipe uses bfloat16."""
    if train.precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
