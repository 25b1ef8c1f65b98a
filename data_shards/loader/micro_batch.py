"""What the loader gives, and the memory it makes it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch. `consumed`: samples of the epoch done, over all ranks, once its global batch is done."""

    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray  # (B, num_classes) uint8, 1 where the sample is of the class
    index: np.ndarray  # (B,) int64, position in the split's index; -1 where padded
    chance: np.ndarray  # (B,) int64, which random numbers are the sample's: `index`, another for each time it comes
    mask: np.ndarray  # (B,) bool, False where padded
    epoch: int
    consumed: int


@dataclass(frozen=True)
class GpuMemory:
    """Memory from which a GPU copies while it computes; giving it says that this process drives one."""

    empty: Callable[[tuple[int, ...]], np.ndarray]
    """Makes the uint8 array of a micro-batch from its shape."""
    lock: Callable[[np.ndarray], Callable[[], None] | None] = lambda memory: None
    """Turns existing memory into such memory and returns what undoes that; None where it cannot."""


def plain_memory(shape: tuple[int, ...]) -> np.ndarray:
    """An uint8 array of this shape, not filled."""
    return np.empty(shape, np.uint8)
