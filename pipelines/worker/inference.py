"""Logits of a split, each sample exactly once: what validation, evaluation and nothing else does with a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from data_shards.loader import BatchPlan, Loader
from medmamba.preprocess import preprocess
from pipelines.worker.transfer import prefetched


@torch.no_grad()
def infer(
    forward: Callable[[torch.Tensor], torch.Tensor],
    loader: Loader,
    split: str,
    *,
    micro_batch: int,
    image_size: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns this rank's (index (n,) int64, labels (n,C) uint8 multi-hot, logits (n,C) float32), padding removed.

    Every rank runs `forward` equally often, so that a `forward` with collectives in it cannot hang.
    """
    indices, labels, logits, masks = [], [], [], []
    plan = BatchPlan(split, micro_batch * loader.ranks, image_size, train=False, micro_batch=micro_batch)
    for batch, images, _ in prefetched(loader.epoch(plan), device):
        # They stay on the device until the end: to fetch them would be to wait for it after every batch.
        logits.append(forward(preprocess(images)).float().clone())
        masks.append(batch.mask)
        indices.append(batch.index[batch.mask])
        labels.append(batch.labels[batch.mask])
        progress(int(batch.mask.sum()))
    found = torch.cat(logits).cpu().numpy()[np.concatenate(masks)]
    return np.concatenate(indices), np.concatenate(labels), found


def join(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], num_samples: int, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (labels (n,C), logits (n,C)) in the order of the split's index, from the parts of all ranks.

    Raises ValueError where a sample is missing or stands in two parts: a metric over other samples is not this split's.
    """
    index = np.concatenate([part[0] for part in parts])
    seen = np.bincount(index, minlength=num_samples)
    if len(seen) != num_samples or not (seen == 1).all():
        raise ValueError(
            f"split {split} has {num_samples} samples, but {int((seen == 0).sum())} were never evaluated and "
            f"{int((seen > 1).sum())} more than once: the evaluation is not of this split; report this as a defect"
        )
    order = np.argsort(index)
    return np.concatenate([part[1] for part in parts])[order], np.concatenate([part[2] for part in parts])[order]
