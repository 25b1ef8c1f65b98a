"""Batches from the loader's memory to the device of the training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def batch_memory(device: torch.device) -> Callable[[tuple[int, ...]], np.ndarray] | None:
    """What the loader makes its batches in: pinned memory for a GPU, which copies from it beside other work."""
    if device.type != "cuda":
        return None
    return lambda shape: torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor there; from pinned memory without waiting for the copy.

    The memory may be let go at once: torch hands pinned memory out again only when copies from it are done.
    """
    return torch.from_numpy(array).to(device, non_blocking=True)
