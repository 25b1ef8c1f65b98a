"""What arrives on the device is what the loader made, whatever becomes of the loader's memory afterwards."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from data_shards.loader import MicroBatch
from pipelines.worker.transfer import batch_memory, page_locked, prefetched

CPU = torch.device("cpu")


def batch(number: int, images: np.ndarray) -> MicroBatch:
    images[:] = np.random.default_rng(number).integers(0, 256, images.shape, dtype=np.uint8)
    return made(number, images)


def made(number: int, images: np.ndarray) -> MicroBatch:
    index = np.arange(len(images))
    labels = np.full((len(images), 3), number, np.uint8)
    return MicroBatch(images, labels, index, index, index >= 0, 0, len(images) * (number + 1))


def test_on_a_cpu_a_batch_is_used_in_place_without_prefetch():
    asked = []

    def stream():
        for number in range(3):
            asked.append(number)
            yield batch(number, np.empty((2, 4, 4, 3), np.uint8))

    for number, (found, images, labels) in enumerate(prefetched(stream(), CPU)):
        assert asked == list(range(number + 1))
        assert images.data_ptr() == found.images.ctypes.data
        assert labels.tolist() == [[number] * 3] * 2
    assert len(asked) == 3
    assert batch_memory(CPU) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["page-locked ring", "pinned by torch", "pageable"])
def test_on_a_gpu_each_batch_arrives_whole_and_memory_is_reused(kind):
    device = torch.device("cuda")
    shape, slots = (16, 64, 64, 3), 6
    size = int(np.prod(shape))
    ring = np.frombuffer(mmap.mmap(-1, slots * size), np.uint8)
    unlock = page_locked(ring, device) if kind == "page-locked ring" else None
    assert (unlock is not None) == (kind == "page-locked ring")
    memory = batch_memory(device)

    def stream():
        for number in range(40):
            if kind == "page-locked ring":  # the loader's contract: at most `slots` are lent
                yield batch(number, ring[number % slots * size :][:size].reshape(shape))
            else:
                yield batch(number, memory.empty(shape) if kind == "pinned by torch" else np.empty(shape, np.uint8))

    sums = []
    for _, images, labels in prefetched(stream(), device):
        torch.cuda._sleep(2_000_000)  # a millisecond
        sums.append((images.long().sum(), labels.long().sum()))
    expected = [int(batch(number, np.empty(shape, np.uint8)).images.astype(np.int64).sum()) for number in range(40)]
    assert [int(images) for images, _ in sums] == expected
    assert [int(labels) for _, labels in sums] == [number * 48 for number in range(40)]
    if unlock is not None:
        assert torch.from_numpy(ring[:size]).is_pinned()
        unlock()
        assert not torch.from_numpy(ring[:size]).is_pinned()


@pytest.mark.gpu
def test_a_ring_that_would_take_too_much_memory_is_not_locked(monkeypatch):
    monkeypatch.setattr("pipelines.worker.transfer.memory_bytes", lambda: 16 << 20)
    assert page_locked(np.zeros((1 << 20) + 1, np.uint8), torch.device("cuda")) is None
