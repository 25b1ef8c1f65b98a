"""Logits and multi-hot labels -> the loss of a task, and logits -> scores.

Tasks: `multiclass` and `ordinal` (exactly one class per sample), `multilabel` (any number).
Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812


def class_weights(counts: Sequence[int]) -> np.ndarray:
    """Weight per class (C,), inverse to its number of samples, with mean 1 over all samples.

    The mean of 1 keeps the scale of the loss and therefore of the learning rate. Raises ValueError for a class without
    samples.
    """
    counts_C = np.asarray(counts, dtype=np.float64)
    if counts_C.size == 0 or (counts_C <= 0).any():
        raise ValueError(f"class counts {list(counts)}: every class needs at least one sample; check the split")
    weights_C: np.ndarray = counts_C.sum() / (counts_C.size * counts_C)
    return weights_C


def classification_loss(
    logits_BC: torch.Tensor,
    labels_BC: torch.Tensor,
    task: str,
    *,
    weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean loss over the batch, a float32 scalar for any type of logits.

    Cross-entropy for multiclass and ordinal, mean binary cross-entropy over classes for multilabel. `weights` (C,)
    multiply a sample's loss by the weight of its class (multilabel: each label's loss by the label's weight). The mean
    is over B, not over the weights, so the mean over equal micro-batches is the mean over the global batch. Raises
    ValueError for an unknown task.
    """
    logits, targets = logits_BC.float(), labels_BC.to(logits_BC.device, torch.float32)
    if weights is not None:
        weights = weights.to(logits.device, torch.float32)
    if _exclusive(task):
        smoothed = targets * (1 - label_smoothing) + label_smoothing / targets.shape[1]
        loss_B = -(smoothed * F.log_softmax(logits, dim=1)).sum(1)
        return (loss_B if weights is None else loss_B * (targets @ weights)).mean()
    smoothed = targets * (1 - label_smoothing) + label_smoothing / 2
    loss_BC = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
    return (loss_BC if weights is None else loss_BC * weights).mean()


def scores(logits_BC: torch.Tensor, task: str) -> torch.Tensor:
    """Float32 probabilities (B, C): softmax for multiclass and ordinal, sigmoid for multilabel."""
    logits = logits_BC.float()
    return torch.softmax(logits, dim=1) if _exclusive(task) else torch.sigmoid(logits)


def _exclusive(task: str) -> bool:
    if task not in ("multiclass", "ordinal", "multilabel"):
        raise ValueError(f"task {task!r}: must be multiclass, ordinal or multilabel")
    return task != "multilabel"
