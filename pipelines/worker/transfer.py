"""Copies batches from the loader's memory to the training device, one ahead of the step that uses them."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from data_shards.loader import GpuMemory, MicroBatch
from data_shards.loader.pixel_file import memory_bytes

# How far the host may run ahead: enough to keep the GPU busy, few enough to limit the memory for images.
_STEPS_AHEAD = 4
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device of this process
# Page-locked memory cannot be used for anything else; a larger ring stays unlocked.
_LOCKED_SHARE = 1 / 16

Arrived = tuple[MicroBatch, torch.Tensor, torch.Tensor]


def batch_memory(device: torch.device) -> GpuMemory | None:
    """Memory for the loader's batches: page-locked for a GPU, so that copies overlap with other work; else None."""
    if device.type != "cuda":
        return None
    return GpuMemory(
        empty=lambda shape: torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy(),
        lock=lambda memory: page_locked(memory, device),
    )


def page_locked(memory: np.ndarray, device: torch.device) -> Callable[[], None] | None:
    """Page-locks existing memory; returns a function that unlocks it, or None if the memory could not be locked."""
    if memory.nbytes > memory_bytes() * _LOCKED_SHARE:
        return None
    runtime, address = torch.cuda.cudart(), memory.ctypes.data
    with torch.cuda.device(device):  # a thread of the loader starts with device 0
        if int(runtime.cudaHostRegister(address, memory.nbytes, _PORTABLE)) != 0:
            return None

    def unlock() -> None:
        assert memory.ctypes.data == address  # keeps a reference, so the memory lives until here
        with contextlib.suppress(RuntimeError):  # a failed device does not copy any more
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(address)

    return unlock


def prefetched(stream: Iterable[MicroBatch], device: torch.device) -> Iterator[Arrived]:
    """Yields each batch with its images (B, H, W, C) and labels (B, num_classes), both uint8, on the device.

    For a GPU, copies run on a separate stream during the previous step. The tensors are safe to use on the current
    stream, and may be released at any time.
    """
    if device.type != "cuda":
        for batch in stream:
            yield batch, torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
        return
    copies = _copy_stream(device)
    on_way: deque[tuple[Arrived, torch.cuda.Event]] = deque()
    sources: deque[tuple[MicroBatch, torch.cuda.Event]] = deque()  # kept alive until their copies are done
    steps: deque[torch.cuda.Event] = deque()
    try:
        for batch in stream:
            on_way.append(_sent(batch, copies, device))
            sources.append((batch, on_way[-1][1]))
            if len(on_way) > 1:
                yield _arrived(*on_way.popleft())
                _wait_for_steps(steps, device)
            while sources and sources[0][1].query():
                sources.popleft()
        while on_way:
            yield _arrived(*on_way.popleft())
    finally:
        copies.synchronize()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all epochs, because torch caches freed memory per stream."""
    return torch.cuda.Stream(device)


def _sent(batch: MicroBatch, copies: torch.cuda.Stream, device: torch.device) -> tuple[Arrived, torch.cuda.Event]:
    with torch.cuda.stream(copies):
        images = torch.from_numpy(batch.images).to(device, non_blocking=True)
        # to_device() pins the labels: from unpinned memory the host would wait for the earlier copies.
        labels = to_device(batch.labels, device)
        return (batch, images, labels), copies.record_event()


def _arrived(arrived: Arrived, copied: torch.cuda.Event) -> Arrived:
    """Makes the current stream wait for the copy, and keeps the tensors' memory until that stream is done with it."""
    current = torch.cuda.current_stream(arrived[1].device)
    current.wait_event(copied)
    for tensor in arrived[1:]:
        tensor.record_stream(current)
    return arrived


def _wait_for_steps(steps: deque[torch.cuda.Event], device: torch.device) -> None:
    """Marks the end of the step just launched, and waits until the GPU is at most _STEPS_AHEAD steps behind."""
    steps.append(torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True)))
    if len(steps) > _STEPS_AHEAD:
        steps.popleft().synchronize()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies a small array to the device without waiting for the device."""
    tensor = torch.from_numpy(array)
    return tensor if device.type != "cuda" else tensor.pin_memory().to(device, non_blocking=True)


class Latest:
    """The newest value of a device scalar that has reached the host; reading it never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._here = torch.zeros((), pin_memory=device.type == "cuda")
        self._arrival: torch.cuda.Event | None = None
        self._on_device = device.type == "cuda"
        self._value = 0.0

    def put(self, scalar: torch.Tensor) -> None:
        """Starts copying a value, unless a copy is already in progress."""
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
        """Whether no copy is in progress."""
        if self._arrival is not None and self._arrival.query():
            self._value, self._arrival = float(self._here), None
        return self._arrival is None
