from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from epochs import epoch_of
from tiny_sets import npz_config

from data_shards.convert import convert
from data_shards.loader.local_shard import LocalShards, ShardError
from data_shards.loader.node_cache import DigestError, NodeCache, cache_folder
from data_shards.manifest import Dataset, ShardEntry, open_dataset
from data_shards.shard import tar_key
from data_shards.store import FileStore, open_store


class FarStore(FileStore):
    """A store whose objects are no files of this machine; counts what is asked of it."""

    is_local = False

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.asked: list[tuple[str, int, int | None]] = []

    def path(self, key: str) -> None:
        return None

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        self.asked.append((key, start, length))
        return super().get(key, start=start, length=length)


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("local")
    convert(npz_config(folder), open_store(str(folder / "out")))
    return str(folder / "out")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def digested(monkeypatch) -> list[str]:
    """The names of the files of which the digest was taken."""
    taken, original = [], hashlib.file_digest

    def file_digest(file, kind):
        taken.append(Path(file.name).name)
        return original(file, kind)

    monkeypatch.setattr("data_shards.loader.node_cache.hashlib.file_digest", file_digest)
    return taken


def later(monkeypatch, seconds: float = 60) -> None:
    now = time.time()
    monkeypatch.setattr("data_shards.loader.node_cache.time.time", lambda: now + seconds)


def shards_of(dataset: Dataset, store=None, **options) -> LocalShards:
    return LocalShards([(store or dataset.store, entry) for entry in dataset.manifest.shards], **options)


def read_all(shards: LocalShards, dataset: Dataset, split: str = "train") -> list[bytes]:
    index = dataset.index(split)
    return shards.read_many(index.shard, index.offset, index.size)


def entry_of(data: bytes, name: str = "x") -> ShardEntry:
    return ShardEntry(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), count=1)


def test_a_file_is_verified_once_per_machine_and_after_a_change(tmp_path, monkeypatch, digested):
    path, data = tmp_path / "a.tar", b"shard" * 1000
    path.write_bytes(data)
    later(monkeypatch)
    sha256 = hashlib.sha256(data).hexdigest()
    for _ in range(3):
        assert NodeCache().verified(path, sha256)[:] == data
    assert digested == ["a.tar"]
    state = path.stat()
    with path.open("r+b") as file:  # in place, of the same length, and dated back
        file.write(b"SHARD")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(DigestError, match=hashlib.sha256(path.read_bytes()).hexdigest()):
        NodeCache().verified(path, sha256)
    beside = tmp_path / "b.tar"
    beside.write_bytes(data)
    os.replace(beside, path)
    assert NodeCache().verified(path, sha256)[:] == data
    assert len(digested) == 3


def test_a_file_that_was_just_written_is_not_yet_trusted(tmp_path, digested):
    path = tmp_path / "a.tar"
    path.write_bytes(b"data")
    for _ in range(2):
        NodeCache().verified(path, hashlib.sha256(b"data").hexdigest())
    assert len(digested) == 2


def test_an_open_shard_stays_as_it_was_when_replaced(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"old bytes")
    mapped = NodeCache().verified(path, hashlib.sha256(b"old bytes").hexdigest())
    (tmp_path / "b").write_bytes(b"new bytes")
    os.replace(tmp_path / "b", path)
    assert mapped[:] == b"old bytes"


def test_the_least_recent_copies_of_other_datasets_are_evicted(cache):
    contents = {name: name.encode() * 1000 for name in "abcdef"}
    entries = {name: entry_of(data) for name, data in contents.items()}
    held = NodeCache(limit_bytes=3500)

    def copy(name: str, mine: str) -> bool:
        found = held.copy(entries[name], lambda: iter([contents[name]]), mine={entries[m].sha256 for m in mine})
        assert found is None or found[:] == contents[name]
        return found is not None

    def there() -> set[str]:
        return {name for name in contents if (cache / f"{entries[name].sha256}.tar").exists()}

    for turn, name in enumerate("abc"):
        assert copy(name, "abc")
        os.utime(cache / f"{entries[name].sha256}.tar", (turn, turn))
    assert copy("a", "abc")  # used again: b is now the oldest
    assert copy("d", "de")
    assert there() == {"a", "c", "d"}
    assert copy("e", "de")
    assert there() == {"a", "d", "e"}
    assert not copy("f", "adef")
    assert there() == {"a", "d", "e"}


def test_a_copy_in_use_by_another_process_is_not_removed(cache):
    from data_shards.loader.node_cache import _locked

    old, new = entry_of(b"o" * 1000), entry_of(b"n" * 1000)
    held = NodeCache(limit_bytes=1500)
    held.copy(old, lambda: iter([b"o" * 1000]), mine=())
    with _locked(cache, old.sha256):
        assert held.copy(new, lambda: iter([b"n" * 1000]), mine=()) is None
    assert held.copy(new, lambda: iter([b"n" * 1000]), mine=()) is not None


def test_a_shard_is_fetched_once_by_all_who_ask_for_it_at_once():
    fetched = []

    def fetch():
        fetched.append(1)
        time.sleep(0.05)
        yield b"data"

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: NodeCache().copy(entry_of(b"data"), fetch, mine=())[:], range(4)))
    assert found == [b"data"] * 4
    assert fetched == [1]


def test_a_killed_fetch_leaves_nothing_mistaken_for_a_shard(cache):
    script = (
        "import os, signal\nfrom test_local_shard import entry_of\n"
        "from data_shards.loader.node_cache import NodeCache\n"
        "def fetch():\n    yield b'da'\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "NodeCache().copy(entry_of(b'data'), fetch, mine=())"
    )
    path = os.pathsep.join(str(Path(__file__).parents[n]) for n in (0, 1, 4))
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path})
    assert killed.returncode == -9
    assert [file.suffix for file in cache.iterdir() if file.is_file()] == [".part"]
    assert NodeCache().copy(entry_of(b"other"), lambda: iter([b"other"]), mine=())[:] == b"other"
    assert not list(cache.glob("*.part"))  # what the killed one left counts no more
    assert NodeCache().copy(entry_of(b"data"), lambda: iter([b"data"]), mine=())[:] == b"data"


def test_what_arrives_damaged_is_not_kept(cache):
    with pytest.raises(DigestError):
        NodeCache().copy(entry_of(b"data"), lambda: iter([b"d", b"oto"]), mine=())
    assert not [file for file in cache.iterdir() if file.is_file()]


def test_what_does_not_fit_is_read_by_ranges_and_is_the_same(uri, cache):
    dataset = open_dataset(uri)
    expected = read_all(shards_of(dataset), dataset)
    sizes = [entry.bytes for entry in dataset.manifest.shards if entry.name.startswith("train")]
    far = FarStore(Path(uri))
    found = read_all(shards_of(dataset, far, disk_bytes=sum(sizes[:3])), dataset)
    assert found == expected
    assert len(list(cache.glob("*.tar"))) == 3
    # Copies are fetched whole; of each of the others all images come with one request.
    assert len(far.asked) == len(sizes)
    assert sum(length < 1 << 24 for _, _, length in far.asked) == len(sizes) - 3


def test_ranges_in_any_order_give_each_image_its_own_bytes(uri):
    dataset = open_dataset(uri)
    index = dataset.index("train")
    order = np.random.default_rng(0).permutation(len(index))[:20]
    near, far = shards_of(dataset), shards_of(dataset, FarStore(Path(uri)), disk_bytes=1)
    places = (index.shard[order], index.offset[order], index.size[order])
    assert far.read_many(*places) == near.read_many(*places)


@pytest.mark.parametrize("damage", ["replaced", "shorter", "missing"])
def test_damage_in_a_shard_read_by_ranges_is_an_error(tmp_path, damage):
    store = FarStore(tmp_path / "out")
    convert(npz_config(tmp_path), store)
    dataset = open_dataset(str(tmp_path / "out"))
    key = tar_key("train-00001")
    data = store.get(key)
    store.delete(key)
    if damage != "missing":
        store.put(key, data[512:] + data[:512] if damage == "replaced" else data[:5000])
    with pytest.raises(ShardError, match=r"shards/train-00001\.tar .* under another --run"):
        read_all(shards_of(dataset, store, disk_bytes=1), dataset)


def test_batches_of_a_dataset_that_does_not_fit_are_the_same(uri, s3, cache):
    remote = open_store(s3)
    for key in open_store(uri).list():
        remote.put(key, open_store(uri).get(key))
    options = {"batch_size": 10, "image_size": 16, "train": True, "workers": 2, "processes": True}
    expected, found = (
        [batch.images.tobytes() for batch in epoch_of(open_dataset(store), "train", disk_bytes=100_000, **options)]
        for store in (uri, s3)
    )
    assert found == expected
    assert 0 < sum(path.stat().st_size for path in cache.glob("*.tar")) <= 100_000


def test_without_room_folders_are_read_and_s3_names_a_remedy(uri, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    dataset = open_dataset(uri)
    assert len(read_all(shards_of(dataset), dataset)) == 50
    with pytest.raises(ShardError, match=r"shard cache .* make it readable and writable, and free some space"):
        read_all(shards_of(dataset, FarStore(Path(uri))), dataset)
