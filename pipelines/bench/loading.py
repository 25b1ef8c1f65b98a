"""The loading half of `medmamba bench data`: this project's loader and alternatives.

Each loader runs in its own process (`main`) on the same images and, in its first epoch, the same random crops. That
epoch starts the workers and is checked: every image must arrive exactly once and match PIL's decoding. A loader that
fails gets a reason instead of a speed.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from data_shards.loader import BatchPlan, Loader
from data_shards.loader.pixels import Crop
from pipelines.bench.work import SEED, Delivered, Work, check, processor_s, read_work, send


def ours(work: Work) -> Callable[[int], Delivered]:
    """This project's loader, from shards, without a cache in memory."""
    loader = Loader(work.dataset, workers=work.workers, processes=True, cache_bytes=0)
    number_at = np.empty(work.num, np.int64)
    number_at[work.positions] = np.arange(work.num)
    crop = Crop(work.min_area) if work.min_area else None
    plan = BatchPlan("train", work.batch, work.target, train=True, seed=SEED, crop=crop)

    def epoch(number: int) -> Delivered:
        for batch in loader.epoch(plan, number):
            yield number_at[batch.index].tolist(), batch.images

    return epoch


def _peer(name: str, work: Work) -> Callable[[int], Delivered]:
    """A loader of another project. Its dependencies may be missing, and so may peers/, which `submit` skips."""
    make: Callable[[Work], Callable[[int], Delivered]] = getattr(
        importlib.import_module("pipelines.bench.peers.loaders"), name
    )
    return make(work)


LOADERS: dict[str, Callable[[Work], Callable[[int], Delivered]]] = {
    "medmamba": ours,
    "DataLoader over PIL": partial(_peer, "torch_loader"),
    "webdataset": partial(_peer, "webdataset_pipeline"),
    "Ray Data": partial(_peer, "ray_data"),
    "LitData": partial(_peer, "litdata_loader"),
    "MosaicML Streaming": partial(_peer, "mosaic_streaming"),
}


class TimedLoader:
    """A loader that has started its workers and delivered a correct first epoch; otherwise `why_not` is set."""

    def __init__(self, name: str, work: Work) -> None:
        self.why_not = ""
        try:
            self._epoch = LOADERS[name](work)
        except ImportError as error:
            self.why_not = f"cannot be imported: {error}"
        except RuntimeError as error:  # raised by a torchvision that was built for another torch
            self.why_not = f"cannot be imported: {' '.join(str(error).split())}"
        else:
            if wrong := check(self._epoch(0), work):
                self.why_not = f"wrong: {wrong}"
        self._next = 1

    def time_epoch(self) -> dict[str, float]:
        """Reads the next epoch; returns images, seconds and processor_s of all processes."""
        began, before = time.perf_counter(), processor_s()
        delivered = sum(len(numbers) for numbers, _ in self._epoch(self._next))
        self._next += 1
        found = {"images": delivered, "seconds": time.perf_counter() - began}
        return {**found, "processor_s": processor_s() - before}


def main() -> None:
    """Measures the loader argv[1] on the work in the folder argv[2].

    Prints a line of JSON when it is ready, then reads an epoch and prints a line for each line of standard input, so
    that the compared loaders can take turns.
    """
    work = read_work(sys.argv[2])
    loader = TimedLoader(sys.argv[1], work)
    send({"why_not": loader.why_not})
    if not loader.why_not:
        for _ in sys.stdin:
            send(loader.time_epoch())
