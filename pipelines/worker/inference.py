"""Logits of a split, each sample exactly once, for validation and evaluation."""

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
    """Returns this rank's (index (n,) int64, labels (n, C) uint8 multi-hot, logits (n, C) float32), without padding.

    Every rank calls `forward` equally often, so a `forward` that contains collectives cannot hang.
    """
    indices, labels, logits, masks = [], [], [], []
    plan = BatchPlan(split, micro_batch * loader.ranks, image_size, train=False, micro_batch=micro_batch)
    for batch, images, _ in prefetched(loader.epoch(plan), device):
        # Logits stay on the device until the end: copying them would wait for the device after every batch.
        logits.append(forward(preprocess(images)).float().clone())
        masks.append(batch.mask)
        indices.append(batch.index[batch.mask])
        labels.append(batch.labels[batch.mask])
        progress(int(batch.mask.sum()))
    kept = torch.cat(logits).cpu().numpy()[np.concatenate(masks)]
    return np.concatenate(indices), np.concatenate(labels), kept


def join(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], num_samples: int, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Merges the parts of all ranks into (labels (n, C), logits (n, C)) in the order of the split's index.

    Raises ValueError if a sample is missing or occurs more than once.
    """
    index = np.concatenate([part[0] for part in parts])
    seen = np.bincount(index, minlength=num_samples)
    if len(seen) != num_samples or not (seen == 1).all():
        raise ValueError(
            f"split {split} has {num_samples} samples, but {int((seen == 0).sum())} were never evaluated and "
            f"{int((seen > 1).sum())} more than once; please report this as a bug"
        )
    order = np.argsort(index)
    return np.concatenate([part[1] for part in parts])[order], np.concatenate([part[2] for part in parts])[order]
