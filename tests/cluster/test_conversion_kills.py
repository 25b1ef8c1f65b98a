"""Drivers and workers of a conversion killed at random moments, and two drivers at once: the same bytes in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ray_cluster

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.manifest import MANIFEST
from data_shards.store import Store, open_store
from data_shards.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NUM_KILLS = 20
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-only"}
DRIVER = """
import sys
from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.store import open_store
from pipelines.cluster import ray_session
from pipelines.steps.shard import ray_map
ray_session.connect()
print("connected", flush=True)
convert(DataConfig.model_validate_json(sys.argv[1]), open_store(sys.argv[2]), run_tasks=ray_map)
"""


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory, s3_server):
    # Keys are each node's own: no driver passes them on.
    with ray_cluster({**AUTH, **s3_server.env}, log=tmp_path_factory.mktemp("ray") / "head.log") as head:
        yield head.address


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """12,000 images of noise, every tenth a copy of the next, in 60 shards."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, num in {"train": 9000, "val": 1000, "test": 2000}.items():
        images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        images[::10] = images[1::10]
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, rng.integers(0, 3, (num, 1)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", **arrays)
    return DataConfig(dataset="tiny", layout="npz", source=str(tmp_path / "set.npz"), samples_per_shard=200)


@pytest.fixture(params=["file", "s3"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "store") if request.param == "file" else request.getfixturevalue("s3")


def driver(config: DataConfig, out: Store, ray_address: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, config.model_dump_json(), out.uri],
        env={**os.environ, **AUTH, "RAY_ADDRESS": ray_address, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "connected\n", process.stderr.read()
    return process


def ended(process: subprocess.Popen) -> None:
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told[-3000:]


def objects(out: Store) -> dict[str, bytes]:
    # A driver killed in its first look at the store leaves what it looked with, which is no part of a dataset.
    return {key: out.get(key) for key in out.list() if not key.startswith(".probe-")}


def workers_of(ray_address: str) -> list[int]:
    """Processes of this Ray in which a task of ours runs just now."""
    port = ray_address.rpartition(":")[2]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environ = (folder / "environ").read_bytes()
        except OSError:  # ended while we looked
            continue
        if title.startswith(("ray::write_shard", "ray::scan_rows")) and f":{port}".encode() in environ:
            found.append(int(folder.name))
    return found


def test_randomly_killed_drivers_write_the_undisturbed_shards(config, root, ray_address, tmp_path):
    whole, killed = open_store(str(tmp_path / "whole")), open_store(f"{root}/killed")
    convert(config, whole)
    chance, kills = random.Random(1), 0
    while kills < NUM_KILLS:
        process = driver(config, killed, ray_address)
        time.sleep(chance.uniform(0.0, 2.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if killed.head(MANIFEST) is not None:  # whole already: from the beginning
            assert objects(killed) == objects(whole)
            for key in list(killed.list()):
                killed.delete(key)
    ended(driver(config, killed, ray_address))
    assert objects(killed) == objects(whole)
    assert verify(killed).problems == []


def test_workers_killed_at_twenty_random_moments_change_nothing(config, root, ray_address, tmp_path):
    whole = open_store(str(tmp_path / "whole"))
    convert(config, whole)
    chance, kills, runs = random.Random(2), 0, 0
    while kills < NUM_KILLS:
        out = open_store(f"{root}/run{runs}")
        process, runs = driver(config, out, ray_address), runs + 1
        while process.poll() is None and kills < NUM_KILLS:
            time.sleep(chance.uniform(0.1, 0.8))
            for pid in workers_of(ray_address)[:1]:
                os.kill(pid, signal.SIGKILL)
                kills += 1
        ended(process)
        assert objects(out) == objects(whole)


def test_two_drivers_at_once_make_what_one_makes(config, root, ray_address, tmp_path):
    whole, out = open_store(str(tmp_path / "whole")), open_store(f"{root}/both")
    convert(config, whole)
    one, two = driver(config, out, ray_address), driver(config, out, ray_address)
    ended(one)
    ended(two)
    assert objects(out) == objects(whole)
