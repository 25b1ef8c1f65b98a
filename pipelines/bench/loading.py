"""What `medmamba bench data` compares at loading: this project's loader and what else a user would take.

Each is run in a process of its own (`main`) on the same images and, in its first epoch, the same random parts of them.
That epoch starts the workers and is checked: every image delivered exactly once, and as the picture that PIL makes of
it. A loader that fails has no speed, but a reason.
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
from pipelines.bench.work import SEED, Delivered, Work, check, processor_s, read_work, tell


def ours(work: Work) -> Callable[[int], Delivered]:
    """This project's loader, from shards, nothing kept in memory."""
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
    """A loader of another project: what it needs may be missing, and so may peers/, which `submit` does not ship."""
    return getattr(importlib.import_module("pipelines.bench.peers.loaders"), name)(work)


LOADERS: dict[str, Callable[[Work], Callable[[int], Delivered]]] = {
    "medmamba": ours,
    "DataLoader over PIL": partial(_peer, "torch_loader"),
    "webdataset": partial(_peer, "webdataset_pipeline"),
    "Ray Data": partial(_peer, "ray_data"),
    "LitData": partial(_peer, "litdata_loader"),
    "MosaicML Streaming": partial(_peer, "mosaic_streaming"),
}


class TimedLoader:
    """A loader that has started its workers and delivered a first, right epoch; or `why_not`."""

    def __init__(self, name: str, work: Work):
        self.why_not = ""
        try:
            self._epoch = LOADERS[name](work)
        except ImportError as error:
            self.why_not = f"cannot be imported: {error}"
        except RuntimeError as error:  # torchvision beside a torch it was not built for
            self.why_not = f"cannot be imported: {' '.join(str(error).split())}"
        else:
            if wrong := check(self._epoch(0), work):
                self.why_not = f"wrong: {wrong}"
        self._next = 1

    def time_epoch(self) -> dict[str, float]:
        """Reads one more epoch: its images, seconds, and seconds of processor time of all its processes."""
        began, before = time.perf_counter(), processor_s()
        delivered = sum(len(numbers) for numbers, _ in self._epoch(self._next))
        self._next += 1
        found = {"images": delivered, "seconds": time.perf_counter() - began}
        return {**found, "processor_s": processor_s() - before}


def main() -> None:
    """The loader argv[1] on the work in the folder argv[2]: a line of JSON when it is ready, and one for each epoch.

    An epoch is read for each line of standard input, so that loaders that are compared can take turns.
    """
    work = read_work(sys.argv[2])
    loader = TimedLoader(sys.argv[1], work)
    tell({"why_not": loader.why_not})
    if not loader.why_not:
        for _ in sys.stdin:
            tell(loader.time_epoch())
