"""Micro-batches, and the memory they are created in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch. `consumed`: samples of the epoch over all ranks, up to the end of its global batch."""

    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray  # (B, num_classes) uint8, 1 where the sample is of the class
    index: np.ndarray  # (B,) int64, position in the split's index; -1 for padding
    chance: np.ndarray  # (B,) int64, address of the sample's random numbers: `index`, different for each repetition
    mask: np.ndarray  # (B,) bool, False for padding
    epoch: int
    consumed: int


@dataclass(frozen=True)
class GpuMemory:
    """Memory from which a GPU can copy while it computes; passing it means that this process drives a GPU."""

    empty: Callable[[tuple[int, ...]], np.ndarray]
    """Creates the uint8 array of a micro-batch from its shape."""
    lock: Callable[[np.ndarray], Callable[[], None] | None] = lambda memory: None
    """Page-locks existing memory and returns a function that undoes it; None if it cannot."""


def plain_memory(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialized uint8 array of this shape."""
    return np.empty(shape, np.uint8)
