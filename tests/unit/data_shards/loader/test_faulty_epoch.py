"""A conversion and an epoch through a proxy that breaks what passes: no sample lost or repeated, the same bytes."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
from epochs import epoch_of
from fault_proxy import KINDS, Schedule, fault_proxy

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.manifest import open_dataset
from data_shards.store import open_store

EPOCH = {"batch_size": 32, "image_size": 28, "seed": 3, "epoch": 1}


def written(store) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list() if key != "config.json"}


def seen(store) -> dict[str, list]:
    """The batches of an epoch of each split."""
    dataset = open_dataset(store)
    return {
        split: list(epoch_of(dataset, split, train=split == "train", workers=3, **EPOCH))
        for split in ("train", "val", "test")
    }


def check_complete(dataset, epoch) -> int:
    """Asserts that each sample was seen once (in training but for the incomplete last batch); how many there were."""
    for split, found in epoch.items():
        index = np.concatenate([batch.index[batch.mask] for batch in found])
        in_split = len(dataset.index(split))
        wanted = in_split // EPOCH["batch_size"] * EPOCH["batch_size"] if split == "train" else in_split
        assert len(index) == len(set(index.tolist())) == wanted
    return sum(int(batch.mask.sum()) for found in epoch.values() for batch in found)


def convert_and_read(configs, folder, server, monkeypatch, schedule, *, processes) -> int:
    """Both through the proxy, and both without faults into a folder; the number of samples seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    samples = 0
    for number, config in enumerate(configs):
        clean, uri = open_store(str(folder / f"{number}")), f"{server.uri}/faulty-epoch-{folder.name}/{number}"
        convert(config, clean)
        with fault_proxy(server.endpoint, schedule) as address:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                facts = convert(config, open_store(uri), run_tasks=lambda run, tasks: pool.map(run, tasks))
            epoch = seen(open_store(uri))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        assert facts["made"] == facts["num_shards"]
        assert written(open_store(uri)) == written(clean)
        for split, found in seen(clean).items():
            assert len(found) == len(epoch[split])
            for one, other in zip(found, epoch[split], strict=True):
                for name in ("images", "labels", "index", "mask"):
                    assert np.array_equal(getattr(one, name), getattr(other, name))
        samples += check_complete(open_dataset(clean), epoch)
    return samples


def phantoms(num_patients: int, **settings) -> DataConfig:
    return DataConfig(phantoms=PhantomConfig(num_patients=num_patients, images_per_patient=2, side=32), **settings)


@pytest.mark.usefixtures("s3")  # its keys, in the environment
def test_an_epoch_over_faults_is_that_over_none(tmp_path, s3_server, monkeypatch):
    schedule = Schedule(rate=0.4, seed=5, stall_s=0.2)
    config = phantoms(60, samples_per_shard=12)
    convert_and_read([config], tmp_path, s3_server, monkeypatch, schedule, processes=2)
    assert set(schedule.counts) == set(KINDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["moto", "radosgw"])
def test_a_thousand_faults_lose_and_repeat_nothing(kind, tmp_path, request, monkeypatch, shared_dir, capsys):
    server = request.getfixturevalue("s3_server" if kind == "moto" else "radosgw_server")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    schedule = Schedule(rate=0.45, seed=7, stall_s=5)
    sets = partial(DataConfig, layout="npz")
    configs = [
        phantoms(150, samples_per_shard=10),
        sets(dataset="pneumoniamnist", source=str(shared_dir / "data/pneumoniamnist.npz"), samples_per_shard=16),
        sets(dataset="breastmnist", source=str(shared_dir / "data/breastmnist.npz"), samples_per_shard=8),
    ]
    samples = convert_and_read(configs, tmp_path, server, monkeypatch, schedule, processes=4)
    with capsys.disabled():
        print(
            f"\n{kind}: {schedule.counts.total()} faults in {len(schedule.requests)} requests, {samples} samples seen"
        )
        for kind in KINDS:
            print(f"  {kind:15} {schedule.counts[kind]:5}")
    assert schedule.counts.total() >= 1000
    assert min(schedule.counts[kind] for kind in KINDS) >= 50
