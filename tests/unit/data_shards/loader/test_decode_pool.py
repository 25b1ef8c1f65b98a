from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from epochs import epoch_of
from tiny_sets import coded, npz_config, pixels

from data_shards.convert import convert
from data_shards.loader import BatchPlan, Loader
from data_shards.loader.decode_pool import DecodePool, DecodeProcessError
from data_shards.loader.local_shard import ShardError
from data_shards.loader.node_cache import cache_folder
from data_shards.loader.pixels import Coded
from data_shards.manifest import open_dataset
from data_shards.store import open_store

SHAPE = (4, 12, 15, 1)


class Images:
    """Reads coded images by their number, as a shard does by place."""

    def read_many(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        return [coded(pixels(int(number))) for number in offset]


class TorchIsThere:
    """Fails where torch or Ray has been imported."""

    def read_many(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        loaded = {"torch", "ray"} & set(sys.modules)
        if loaded:
            raise AssertionError(f"imported: {loaded}")
        raise ShardError("nothing but the standard library and what data_shards needs")


def wanted(first: int) -> Coded:
    number = np.arange(first, first + SHAPE[0])
    return Coded(np.arange(SHAPE[0]), number, number, number, None)


def expected(first: int) -> np.ndarray:
    return np.stack([pixels(number)[:, :, None] for number in range(first, first + SHAPE[0])])


@contextlib.contextmanager
def pool_of(reader, processes: int = 2):
    pool = DecodePool(reader, processes, SHAPE)
    try:
        yield pool
    finally:
        pool.close()


def put_and_take(pool: DecodePool) -> np.ndarray:
    pool.put(wanted(0))
    return pool.take()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "decode_pool" in " ".join(child.cmdline())]


def test_batches_come_out_in_order_and_stay_while_held():
    with pool_of(Images()) as pool:
        held = []
        for turn in range(30):
            if turn >= pool.depth:
                held.append(pool.take())
            pool.put(wanted(turn))
        held += [pool.take() for _ in range(pool.depth)]
        gc.collect()
        for turn, images in enumerate(held):
            assert np.array_equal(images, expected(turn)), turn


def test_a_batchs_memory_is_reused_only_when_no_part_is_seen():
    with pool_of(Images(), processes=1) as pool:
        pool.put(wanted(0))
        row = pool.take()[2]
        for turn in range(1, 20):
            pool.put(wanted(turn))
            assert np.array_equal(pool.take(), expected(turn))
        assert np.array_equal(row, expected(0)[2])


def test_a_ticket_takes_a_batch_out_of_turn_and_a_drop_frees_it():
    with pool_of(Images()) as pool:
        tickets = [pool.put(wanted(turn)) for turn in range(pool.depth)]
        assert not pool.has_room
        assert np.array_equal(pool.take(tickets[2]), expected(2))
        assert np.array_equal(pool.take(), expected(0))
        pool.drain([tickets[1]])
        assert np.array_equal(pool.take(), expected(3))
        for turn in range(30):
            assert pool.has_room
            assert np.array_equal(pool.take(pool.put(wanted(turn))), expected(turn))


def test_what_is_dropped_may_have_failed():
    with pool_of(TorchIsThere()) as pool:
        pool.put(wanted(0))
        pool.drain()
        with pytest.raises(ShardError):
            put_and_take(pool)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory files are Linux's")
def test_the_shared_memory_has_no_name_that_could_be_left_behind():
    with pool_of(Images(), processes=1):
        ours = [line for line in Path("/proc/self/maps").read_text().splitlines() if "medmamba-batches" in line]
        assert ours
        assert all(line.endswith("/memfd:medmamba-batches (deleted)") for line in ours)


def test_an_error_keeps_its_type_and_the_processes_know_no_torch():
    with pool_of(TorchIsThere()) as pool:
        pool.put(wanted(0))
        with pytest.raises(ShardError, match="nothing but the standard library") as caught:
            pool.take()
        assert "in a decoding process" in caught.value.__notes__[0]


def test_a_killed_process_is_an_error_that_says_so():
    with pool_of(Images()) as pool:
        pool.put(wanted(0))
        assert np.array_equal(pool.take(), expected(0))
        for child in children():
            child.kill()
        with pytest.raises(DecodeProcessError, match=r"was killed by SIGKILL .* fewer loader workers"):
            put_and_take(pool)


def test_processes_end_with_their_parent_also_where_it_is_killed():
    script = (
        "import test_decode_pool as t, os, sys\n"
        "pool = t.DecodePool(t.Images(), 2, t.SHAPE); pool.put(t.wanted(0)); pool.take()\n"
        "print(*[child.pid for child in t.children()], flush=True); sys.stdin.read()"
    )
    path = os.pathsep.join(str(Path(__file__).parents[n]) for n in (0, 1, 4))
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and _runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a decoding process outlived its parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pool")
    convert(npz_config(folder, num={"train": 120, "val": 9, "test": 9}), open_store(str(folder / "out")))
    return str(folder / "out")


def test_an_early_end_keeps_processes_until_the_loader_closes(uri):
    dataset, plan = open_dataset(uri), BatchPlan("train", 6, 16, train=True)
    before = set(children())
    with Loader(dataset, processes=True, cache_bytes=0) as loader:
        stream = iter(loader.epoch(plan))
        next(stream)
        ours = set(children()) - before
        assert len(ours) == 1
        stream.close()
        whole = list(loader.epoch(plan, 1))
        assert set(children()) - before == ours
    assert set(children()) == before
    plain = Loader(dataset, processes=False, cache_bytes=0).epoch(plan, 1)
    assert [batch.index.tolist() for batch in whole] == [batch.index.tolist() for batch in plain]


@pytest.mark.parametrize("ends", ["with the epoch", "with the loader"])
def test_processes_in_use_at_close_end_when_given_back(uri, ends):
    before = set(children())
    loader = Loader(open_dataset(uri), processes=True, cache_bytes=0)
    stream = iter(loader.epoch(BatchPlan("train", 6, 16, train=True)))
    next(stream)
    if ends == "with the epoch":
        loader.close()
        assert len(list(stream)) == 19
    else:
        stream.close()
        assert len(set(children()) - before) == 1
        del stream, loader
        gc.collect()
    assert set(children()) == before


def test_a_program_ending_amid_an_epoch_prints_nothing(uri):
    script = (
        "from data_shards.loader import BatchPlan, Loader\nfrom data_shards.manifest import open_dataset\n"
        f"loader = Loader(open_dataset({uri!r}), processes=True)\n"
        "stream = iter(loader.epoch(BatchPlan('train', 4, 16, train=True)))\n"
        "next(stream)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_two_epochs_of_a_loader_may_run_side_by_side(uri):
    dataset, options = open_dataset(uri), {"batch_size": 9, "image_size": 16}
    loader = Loader(dataset, processes=True, cache_bytes=0)
    train, val = (iter(epoch_of(loader, split, train=split == "train", **options)) for split in ("train", "val"))
    mixed = [next(train), next(val), next(train)]
    inline = {**options, "workers": 0, "cache_bytes": 0}
    alone = list(epoch_of(dataset, "train", train=True, **inline))
    assert np.array_equal(mixed[0].images, alone[0].images)
    assert np.array_equal(mixed[2].images, alone[1].images)
    assert np.array_equal(mixed[1].images, next(iter(epoch_of(dataset, "val", train=False, **inline))).images)


def test_a_damaged_shard_is_the_same_error_from_a_process(tmp_path):
    store = open_store(str(tmp_path / "out"))
    convert(npz_config(tmp_path), store)
    store.put("shards/train-00002.tar", store.get("shards/train-00002.tar")[:-1] + b"x")
    with pytest.raises(ShardError, match=r"shards/train-00002\.tar .* under another --run"):
        list(
            epoch_of(open_dataset(store), "train", batch_size=25, image_size=16, train=True, workers=2, processes=True)
        )


def read_until_killed(uri: str, state: str, lines_until_kill: int | None, delay_s: float) -> list[list[str]]:
    """What a reader in a process group of its own tells; killed, group and all, `delay_s` after so many lines."""
    path = str(Path(__file__).parents[4])
    reader = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "read_epochs.py"), uri, state],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    told = []
    with reader:
        for line in reader.stdout:
            told.append(line.split())
            if lines_until_kill is not None and len(told) >= lines_until_kill:
                time.sleep(delay_s)
                os.killpg(reader.pid, signal.SIGKILL)
                told += [line.split() for line in reader.stdout if line.endswith("\n")]
                break
    code = reader.wait()
    assert code == (0 if lines_until_kill is None else code)
    assert code in (0, -signal.SIGKILL)
    return told[1:]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_reader_killed_with_its_processes_resumes_bit_for_bit(tmp_path, uri, s3, monkeypatch, kills):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = f"{s3}/{kills}"
    for key in open_store(uri).list():
        open_store(remote).put(key, open_store(uri).get(key))
    expected = dict(reversed(line) for line in read_until_killed(uri, "0:0", None, 0))
    assert len(expected) == 40
    chance, state, found = random.Random(kills), "0:0", {}
    for _ in range(kills):
        for digest, at in read_until_killed(remote, state, chance.randint(1, 1 + 60 // kills), chance.random() * 0.1):
            assert found.setdefault(at, digest) == digest == expected[at]
            state = at
    for digest, at in read_until_killed(remote, state, None, 0):
        found[at] = digest
    assert found == expected
    # The machine's cache: every copy is whole, and nothing half-fetched is left once the last reader has fetched.
    for copy in cache_folder().glob("*.tar"):
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == copy.stem
    assert len(list(cache_folder().glob("*.tar"))) == 15
    assert not list(cache_folder().glob("*.part"))
