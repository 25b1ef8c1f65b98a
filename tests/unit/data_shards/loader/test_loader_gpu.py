"""What the loader does for a process that drives a GPU: decoding in processes, one epoch going over into the next."""

from __future__ import annotations

import gc
import hashlib

import numpy as np
import psutil
import pytest
from tiny_sets import npz_config

from data_shards.convert import convert
from data_shards.loader import GpuMemory, batches
from data_shards.loader import rank_batches as loader
from data_shards.loader.pixels import Crop
from data_shards.manifest import Dataset, open_dataset
from data_shards.store import open_store

GPU = GpuMemory(lambda shape: np.empty(shape, np.uint8))
OPTIONS = {"batch": 12, "micro": 3, "image_size": 16, "seed": 5}


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gpu")
    convert(npz_config(folder), open_store(str(folder / "out")))
    return str(folder / "out")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dataset(uri) -> Dataset:
    return open_dataset(uri)


def fingerprints(stream) -> list[str]:
    arrays = ((b.images, b.labels, b.index, b.chance, b.mask) for b in stream)
    return [hashlib.sha256(b"".join(array.tobytes() for array in each)).hexdigest() for each in arrays]


def processes() -> set[int]:
    found = psutil.Process().children()
    return {child.pid for child in found if "decode_pool" in " ".join(child.cmdline())}


def begun(dataset: Dataset) -> list[tuple[int, int]]:
    """Epoch, and number of its batches that are on their way, of each epoch that has begun before it was asked for."""
    kept = loader._opened[dataset].idle
    return [(started.stream.epoch, len(started.jobs)) for _, started in kept if started is not None]


@pytest.mark.parametrize("gather", [True, False], ids=["processes gather", "a thread gathers"])
@pytest.mark.parametrize("crop", [None, Crop(0.3)], ids=["whole", "parts"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_epochs_that_go_over_into_each_other_hold_the_batches_of_epochs_alone(uri, crop, ranks, gather, monkeypatch):
    monkeypatch.setattr(loader, "_GATHER_BYTES", 0 if gather else 1 << 30)
    options = {**OPTIONS, "crop": crop, "ranks": ranks}
    for rank in range(ranks):
        ours, plain = open_dataset(uri), open_dataset(uri)
        for epoch in range(4):
            for split, train in (("train", True), ("val", False)):  # a validation between two epochs
                asked = {**options, "rank": rank, "train": train, "epoch": epoch if train else 0}
                asked["crop"] = crop if train else None
                found = batches(ours, split, workers=2, memory=GPU, next_epoch=train and epoch < 3, **asked)
                assert fingerprints(found) == fingerprints(batches(plain, split, workers=0, **asked))


def test_beside_a_gpu_workers_are_processes_wherever_anything_is_left_to_decode(dataset, monkeypatch):
    options = {**OPTIONS, "train": True, "workers": 2}
    assert not batches(dataset, "train", **options).decodes_in_processes
    ours = batches(dataset, "train", memory=GPU, **options)
    assert ours.decodes_in_processes
    assert not batches(dataset, "train", memory=GPU, **{**options, "workers": 0}).decodes_in_processes
    assert not batches(dataset, "train", memory=GPU, processes=False, **options).decodes_in_processes
    list(batches(dataset, "train", memory=GPU, **{**options, "batch": 40, "micro": 40, "workers": 0}))
    assert ours.decodes_in_processes  # ten images are left
    list(batches(dataset, "train", memory=GPU, **{**options, "train": False, "workers": 0}))
    assert not ours.decodes_in_processes
    monkeypatch.setattr(loader, "_GATHER_BYTES", 0)
    assert ours.decodes_in_processes  # they copy what is decoded
    parts = batches(dataset, "train", memory=GPU, crop=Crop(0.3), **options)
    list(parts)
    assert parts.decodes_in_processes


def test_the_next_epoch_begins_before_it_is_asked_for_in_the_same_processes(dataset):
    before = processes()
    options = {**OPTIONS, "train": True, "workers": 2, "memory": GPU, "crop": Crop(0.3)}
    found = list(batches(dataset, "train", next_epoch=True, **options))
    assert len(found) == 16
    ours = processes() - before
    assert len(ours) == 2
    assert begun(dataset) == [(1, 2)]
    list(batches(dataset, "val", **{**options, "train": False, "crop": None}))
    assert begun(dataset) == [(1, 2)]  # kept during a validation
    list(batches(dataset, "train", epoch=1, next_epoch=True, **options))
    assert begun(dataset) == [(2, 2)]
    list(batches(dataset, "train", epoch=2, **options))
    assert begun(dataset) == []
    assert processes() - before == ours
    loader._opened.pop(dataset)
    del found
    gc.collect()
    assert processes() == before


def test_an_epoch_that_was_begun_but_is_not_asked_for_is_forgotten(uri):
    dataset = open_dataset(uri)
    options = {**OPTIONS, "train": True, "crop": Crop(0.3)}
    for again in (
        {"epoch": 1, "start": 12},
        {"epoch": 0},
        {"epoch": 1, "seed": 6},
        {"epoch": 1, "rank": 1, "ranks": 2},
    ):
        list(batches(dataset, "train", workers=2, memory=GPU, next_epoch=True, **options))
        asked = {**options, **again}
        found = fingerprints(batches(dataset, "train", workers=2, memory=GPU, **asked))
        assert found == fingerprints(batches(open_dataset(uri), "train", workers=0, **asked))
        assert begun(dataset) == []


def test_an_epoch_left_early_begins_no_other_and_the_next_one_is_whole(uri, dataset):
    options = {**OPTIONS, "train": True, "crop": Crop(0.3)}
    stream = iter(batches(dataset, "train", workers=2, memory=GPU, next_epoch=True, **options))
    next(stream)
    stream.close()
    assert begun(dataset) == []
    found = fingerprints(batches(dataset, "train", workers=2, memory=GPU, epoch=1, **options))
    assert found == fingerprints(batches(open_dataset(uri), "train", workers=0, epoch=1, **options))


def test_batches_stay_what_they_are_while_many_are_held(uri, dataset):
    options = {**OPTIONS, "train": True}
    locked = []
    memory = GpuMemory(GPU.empty, lambda ring: locked.append(ring.nbytes) or (lambda: locked.append(0)))
    held = [b for epoch in (0, 1) for b in batches(dataset, "train", workers=2, memory=memory, epoch=epoch, **options)]
    inline = [fingerprints(batches(open_dataset(uri), "train", workers=0, epoch=epoch, **options)) for epoch in (0, 1)]
    assert fingerprints(held) == inline[0] + inline[1]
    assert len(locked) == 1
    loader._opened.pop(dataset)
    del held
    gc.collect()
    assert locked[1:] == [0]  # undone when the processes end
