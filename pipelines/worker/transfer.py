"""Batches from the loader's memory to the device of the training."""

from __future__ import annotations

from collections import deque
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


class Latest:
    """The newest value of a scalar on the device that has arrived here; looking at it never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._here = torch.zeros((), pin_memory=device.type == "cuda")
        self._arrival: torch.cuda.Event | None = None
        self._on_device = device.type == "cuda"
        self._value = 0.0

    def put(self, scalar: torch.Tensor) -> None:
        """Sends for a value, unless one is on its way."""
        if not self._on_device:
            self._value = float(scalar)
        elif self._arrived():
            self._here.copy_(scalar, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    @property
    def value(self) -> float:
        """The value that arrived last; 0 before the first."""
        self._arrived()
        return self._value

    def _arrived(self) -> bool:
        """Whether nothing is on its way any more."""
        if self._arrival is not None and self._arrival.query():
            self._value, self._arrival = float(self._here), None
        return self._arrival is None


class RunAhead:
    """Keeps the host at most `steps` steps ahead of the device: enough work is queued, and memory stays bounded."""

    def __init__(self, device: torch.device, steps: int = 2) -> None:
        self._on_device, self._steps = device.type == "cuda", steps
        self._queued: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """After each step: waits until the device has finished the step before the last `steps`."""
        if not self._on_device:
            return
        self._queued.append(torch.cuda.Event())
        self._queued[-1].record()
        if len(self._queued) > self._steps:
            self._queued.popleft().synchronize()
