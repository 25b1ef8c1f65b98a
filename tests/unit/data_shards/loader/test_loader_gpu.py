"""What the loader does for a process that drives a GPU: decoding in processes, one epoch going over into the next."""

from __future__ import annotations

import hashlib

import numpy as np
import psutil
import pytest
from epochs import epoch_of
from tiny_sets import npz_config

from data_shards.convert import convert
from data_shards.loader import GpuMemory, Loader
from data_shards.loader import epoch as loader_epoch
from data_shards.loader.pixels import Crop
from data_shards.manifest import open_dataset
from data_shards.store import open_store

GPU = GpuMemory(lambda shape: np.empty(shape, np.uint8))
OPTIONS = {"batch_size": 12, "micro_batch": 3, "image_size": 16, "seed": 5}


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gpu")
    convert(npz_config(folder), open_store(str(folder / "out")))
    return str(folder / "out")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fingerprints(stream) -> list[str]:
    arrays = ((b.images, b.labels, b.index, b.chance, b.mask) for b in stream)
    return [hashlib.sha256(b"".join(array.tobytes() for array in each)).hexdigest() for each in arrays]


def processes() -> set[int]:
    found = psutil.Process().children()
    return {child.pid for child in found if "decode_pool" in " ".join(child.cmdline())}


def begun(loader: Loader) -> list[tuple[int, int]]:
    """Epoch, and number of its batches that are on their way, of each epoch that has begun before it was asked for."""
    return [(started.epoch.plan.epoch, len(started.jobs)) for started in loader.pools.begun]


@pytest.mark.parametrize("gather", [True, False], ids=["processes gather", "a thread gathers"])
@pytest.mark.parametrize("crop", [None, Crop(0.3)], ids=["whole", "parts"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_overlapping_epochs_hold_the_batches_of_single_ones(uri, crop, ranks, gather, monkeypatch):
    monkeypatch.setattr(loader_epoch, "GATHER_BYTES", 0 if gather else 1 << 30)
    for rank in range(ranks):
        where = {"rank": rank, "ranks": ranks}
        with (
            Loader(open_dataset(uri), workers=2, memory=GPU, **where) as ours,
            Loader(open_dataset(uri), workers=0, **where) as plain,
        ):
            for epoch in range(4):
                for split, train in (("train", True), ("val", False)):  # a validation between two epochs
                    asked = {**OPTIONS, "train": train, "epoch": epoch if train else 0, "crop": crop if train else None}
                    found = epoch_of(ours, split, next_epoch=train and epoch < 3, **asked)
                    assert fingerprints(found) == fingerprints(epoch_of(plain, split, **asked))


def test_with_a_gpu_workers_are_processes_if_decoding_is_left(uri, monkeypatch):
    dataset, options = open_dataset(uri), {**OPTIONS, "train": True}
    assert not epoch_of(dataset, "train", workers=2, **options).decodes_in_processes
    assert not epoch_of(dataset, "train", workers=0, memory=GPU, **options).decodes_in_processes
    assert not epoch_of(dataset, "train", workers=2, memory=GPU, processes=False, **options).decodes_in_processes
    with Loader(dataset, workers=2, memory=GPU) as loader, Loader(dataset, workers=0, memory=GPU) as other:
        ours = epoch_of(loader, "train", **options)
        assert ours.decodes_in_processes
        list(epoch_of(other, "train", **{**options, "batch_size": 40, "micro_batch": 40}))
        assert ours.decodes_in_processes  # ten images are left
        list(epoch_of(other, "train", **{**options, "train": False}))
        assert not ours.decodes_in_processes  # all of them are in the file of this machine
        monkeypatch.setattr(loader_epoch, "GATHER_BYTES", 0)
        assert ours.decodes_in_processes  # they copy what is decoded
        parts = epoch_of(loader, "train", crop=Crop(0.3), **options)
        list(parts)
        assert parts.decodes_in_processes


def test_the_next_epoch_starts_early_in_the_same_processes(uri):
    before = processes()
    options = {**OPTIONS, "train": True, "crop": Crop(0.3)}
    with Loader(open_dataset(uri), workers=2, memory=GPU) as loader:
        found = list(epoch_of(loader, "train", next_epoch=True, **options))
        assert len(found) == 16
        ours = processes() - before
        assert len(ours) == 2
        assert begun(loader) == [(1, 2)]
        list(epoch_of(loader, "val", **{**options, "train": False, "crop": None}))
        assert begun(loader) == [(1, 2)]  # kept during a validation
        list(epoch_of(loader, "train", epoch=1, next_epoch=True, **options))
        assert begun(loader) == [(2, 2)]
        list(epoch_of(loader, "train", epoch=2, **options))
        assert begun(loader) == []
        assert processes() - before == ours
    assert processes() == before


def test_an_epoch_started_but_never_requested_is_forgotten(uri):
    options = {**OPTIONS, "train": True, "crop": Crop(0.3)}
    with Loader(open_dataset(uri), workers=2, memory=GPU) as loader:
        for again in ({"epoch": 1, "start": 12}, {"epoch": 0}, {"epoch": 1, "seed": 6}, {"epoch": 2}):
            list(epoch_of(loader, "train", next_epoch=True, **options))
            assert begun(loader) == [(1, 2)]
            asked = {**options, **again}
            found = fingerprints(epoch_of(loader, "train", **asked))
            assert found == fingerprints(epoch_of(open_dataset(uri), "train", workers=0, **asked))
            assert begun(loader) == []


def test_an_epoch_left_early_starts_no_other_and_the_next_works(uri):
    options = {**OPTIONS, "train": True, "crop": Crop(0.3)}
    with Loader(open_dataset(uri), workers=2, memory=GPU) as loader:
        stream = iter(epoch_of(loader, "train", next_epoch=True, **options))
        next(stream)
        stream.close()
        assert begun(loader) == []
        found = fingerprints(epoch_of(loader, "train", epoch=1, **options))
    assert found == fingerprints(epoch_of(open_dataset(uri), "train", workers=0, epoch=1, **options))


def test_batches_stay_what_they_are_while_many_are_held(uri):
    options = {**OPTIONS, "train": True}
    locked = []
    memory = GpuMemory(GPU.empty, lambda ring: locked.append(ring.nbytes) or (lambda: locked.append(0)))
    with Loader(open_dataset(uri), workers=2, memory=memory) as loader:
        held = [batch for epoch in (0, 1) for batch in epoch_of(loader, "train", epoch=epoch, **options)]
    with Loader(open_dataset(uri), workers=0) as plain:
        inline = [fingerprints(epoch_of(plain, "train", epoch=epoch, **options)) for epoch in (0, 1)]
    assert fingerprints(held) == inline[0] + inline[1]
    assert len(locked) == 2
    assert locked[1:] == [0]  # undone when the processes end
