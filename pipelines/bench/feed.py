"""`medmamba bench data --sides`: how fast this project's loader feeds a GPU at each image size.

Batches are made as in training: by worker processes, page-locked and copied to the device if there is a GPU, with
overlapping epochs. Each kind runs in its own process (`main`), after a checked epoch in which every image must arrive
exactly once and match PIL's decoding.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.loader import CACHE_BYTES, BatchPlan, Epoch, GpuMemory, Loader
from data_shards.loader.pixels import Crop
from pipelines.bench.work import SEED, Delivered, Work, check, processor_s, read_work, send

KINDS = ("whole, decoded", "whole, kept", "parts")
_LEAST_S = 2.0  # one epoch of small images is too short to be timed


class Feed:
    """Reads overlapping epochs of one kind; `why_not` says what was wrong with the first, if anything."""

    def __init__(self, kind: str, work: Work) -> None:
        self.work = work if kind == "parts" else work.of_whole()
        memory, self._arrived = _device()
        cache_bytes = CACHE_BYTES if kind == "whole, kept" else 0
        self._loader = Loader(work.dataset, workers=work.workers, memory=memory, cache_bytes=cache_bytes)
        crop = Crop(work.min_area) if kind == "parts" else None
        self._plan = BatchPlan("train", work.batch, work.target, train=True, seed=SEED, crop=crop)
        self._next = 0
        self.why_not = check(self._delivered(), self.work)
        if not self.why_not:  # warm up again: the cache is full now, and the permanent processes have started
            self._read(self._epoch())

    def time(self) -> dict[str, float]:
        """Reads epochs for at least two seconds; returns images, seconds and processor_s of all processes."""
        began, before, images = time.perf_counter(), processor_s(), 0
        while time.perf_counter() - began < _LEAST_S:
            images += self._read(self._epoch())
        found = {"images": images, "seconds": time.perf_counter() - began}
        return {**found, "processor_s": processor_s() - before}

    def _epoch(self) -> Epoch:
        self._next += 1
        return self._loader.epoch(self._plan, self._next - 1, next_epoch=True)

    def _read(self, epoch: Epoch) -> int:
        return sum(len(batch.index) for batch, *_ in self._arrived(epoch))

    def _delivered(self) -> Delivered:
        number_at = np.empty(self.work.num, np.int64)
        number_at[self.work.positions] = np.arange(self.work.num)
        for batch, images, _ in self._arrived(self._epoch()):
            yield number_at[batch.index].tolist(), images.cpu().numpy()


def _device() -> tuple[GpuMemory, Callable[[Epoch], Iterator[tuple[Any, ...]]]]:
    """The memory for batches, and a function that moves an epoch's batches to the device, if there is a GPU."""
    import torch  # lazy: `bench data` imports this module for its table

    from pipelines.worker.transfer import batch_memory, prefetched

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Without copies to a GPU, plain memory is as good as page-locked memory.
    plain = GpuMemory(lambda shape: np.empty(shape, np.uint8), lambda memory: lambda: None)
    return batch_memory(device) or plain, lambda stream: prefetched(stream, device)


def feed_table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table: images/s of each kind of loading for each kind of file."""
    by_file: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = "" if "why_not" in row else f"{row['images_per_s']:,.0f}"
        by_file.setdefault(row["images"], {})[row["by"]] = cell
    return ("images/s", *KINDS), [(file, *(cells.get(kind, "") for kind in KINDS)) for file, cells in by_file.items()]


def main() -> None:
    """Measures the kind argv[1] on the work in the folder argv[2]; prints lines of JSON like `loading.main`."""
    folder = Path(sys.argv[2])
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # so that the cache is deleted with the folder
    feed = Feed(sys.argv[1], read_work(str(folder)))
    send({"why_not": feed.why_not})
    if not feed.why_not:
        for _ in sys.stdin:
            send(feed.time())
