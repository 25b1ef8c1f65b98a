"""The machine's file of decoded images: what is read from it is what was decoded, whoever was killed or came second."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from epochs import epoch_of
from tiny_sets import npz_config

from data_shards.convert import convert
from data_shards.loader import BatchPlan, GpuMemory, Loader, pixels
from data_shards.loader.node_cache import NodeCache, cache_folder
from data_shards.loader.pixel_file import PixelFile, file_bytes, pixel_key
from data_shards.loader.pixels import stretched
from data_shards.manifest import open_dataset
from data_shards.store import open_store

GPU = GpuMemory(lambda shape: np.empty(shape, np.uint8))
SHAPE = (2, 3, 1)
KEY, OTHER, THIRD = ("0" * 63 + digit for digit in "123")


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("kept")
    convert(npz_config(folder, num={"train": 120, "val": 9, "test": 9}), open_store(str(folder / "out")))
    return str(folder / "out")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """One item for each image that is decoded in this process."""
    found = []
    monkeypatch.setattr(pixels, "stretched", lambda *a: found.append(1) or stretched(*a))
    return found


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.pixels"))


def image(number: int) -> np.ndarray:
    return np.full(SHAPE, number, np.uint8)


def opened(key: str = KEY, num: int = 10, limit_bytes: int = 0, **options) -> PixelFile | None:
    return NodeCache(limit_bytes).pixel_file(key, num, SHAPE, **{"to_come": {}, **options})


def expected(uri: str) -> np.ndarray:
    """The 120 images, decoded here and now."""
    (batch,) = epoch_of(open_dataset(uri), "train", batch_size=120, image_size=24, train=False, workers=0)
    return batch.images


def test_a_row_is_visible_to_all_once_written_and_not_before():
    one, two = opened(), opened()
    assert one is not None
    assert two is not None
    found = np.zeros(SHAPE, np.uint8)
    assert not two.read(3, found)
    one.write(3, image(7))
    assert two.read(3, found)
    assert np.array_equal(found, image(7))
    assert two.is_filled.tolist() == [n == 3 for n in range(10)]
    assert np.array_equal(two.images[3], image(7))
    assert not two.read(10, found)  # beyond its rows
    two.write(10, image(1))
    assert os.path.getsize(one.path) == file_bytes(10, 6)
    assert one.path.stat().st_mode & 0o777 == 0o600


def test_pixels_without_their_mark_are_not_believed(cache):
    file = opened()
    with file.path.open("r+b") as torn:  # killed between the pixels and the mark
        torn.seek(4 * 6)
        torn.write(b"\xff" * 3)
    assert not opened().read(4, np.zeros(SHAPE, np.uint8))


def test_the_name_stands_for_the_bytes_the_size_and_the_boot(monkeypatch, tmp_path):
    places = [np.arange(5), np.arange(5) * 100, np.full(5, 40)]
    names = {
        pixel_key(["a"], places, SHAPE),
        pixel_key(["b"], places, SHAPE),
        pixel_key(["a"], [*places[:2], places[2] + 1], SHAPE),
        pixel_key(["a"], places, (3, 2, 1)),
    }
    assert pixel_key(["a"], places, SHAPE) in names
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr("data_shards.loader.pixel_file._BOOT", tmp_path / "boot")
    names.add(pixel_key(["a"], places, SHAPE))
    assert len(names) == 5
    monkeypatch.setattr("data_shards.loader.pixel_file._BOOT", tmp_path / "absent")
    assert pixel_key(["a"], places, SHAPE) is None


def test_a_second_process_of_the_machine_decodes_nothing(uri, cache, decoded):
    options = {"batch_size": 12, "image_size": 24, "train": True}
    for number in (120, 0):  # two trials, each with a loader of its own
        decoded.clear()
        loader = Loader(open_dataset(uri), memory=GPU, workers=1, processes=False)
        found = [b.images.tobytes() for epoch in (0, 1) for b in epoch_of(loader, "train", epoch=epoch, **options)]
        assert len(decoded) == number
        plain = [
            b.images.tobytes() for epoch in (0, 1) for b in epoch_of(open_dataset(uri), "train", epoch=epoch, **options)
        ]
        assert found == plain
    assert len(files(cache)) == 1


def test_random_crops_are_not_kept_without_a_gpu_or_on_request(uri, cache):
    options = {"batch_size": 60, "image_size": 24, "train": True, "workers": 0}
    list(epoch_of(open_dataset(uri), "train", **options))
    list(epoch_of(open_dataset(uri), "train", memory=GPU, crop=pixels.Crop(0.3), **options))
    list(epoch_of(open_dataset(uri), "train", memory=GPU, cache_bytes=0, **options))
    assert files(cache) == []


def test_without_a_place_for_the_file_batches_come_all_the_same(uri, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    options = {"batch_size": 120, "image_size": 24, "train": False, "workers": 0}
    (batch,) = epoch_of(open_dataset(uri), "train", memory=GPU, **options)
    assert np.array_equal(batch.images, expected(uri))


def start(uri: str, first: int, last: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "read_kept.py"), uri, str(first), str(last)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
    )


def told_by(reader: subprocess.Popen) -> dict[str, str]:
    lines = reader.communicate()[0].splitlines()
    assert reader.returncode == 0
    return dict(line.split() for line in lines[1:])


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_file_of_killed_processes_holds_only_decoded_rows(uri, cache, kills):
    images, chance, last = expected(uri), random.Random(kills), 1
    for _ in range(kills):
        reader = start(uri, 0, last)
        for _ in range(chance.randint(1, 12)):
            reader.stdout.readline()
        time.sleep(chance.random() * 0.02)
        os.killpg(reader.pid, signal.SIGKILL)
        reader.communicate()
        for path in files(cache):
            kept = PixelFile(path, (24, 24, 1))
            assert np.array_equal(kept.images[kept.is_filled], images[kept.is_filled])
    (path,) = files(cache)
    assert PixelFile(path, (24, 24, 1)).is_filled.sum() > 0
    found = told_by(start(uri, 0, last))
    os.rename(path, path.with_suffix(".gone"))
    assert found == told_by(start(uri, 0, last))
    assert len(found) == 40


def test_two_processes_that_fill_one_file_at_once_read_the_same(uri, cache):
    readers = [start(uri, 0, 2), start(uri, 0, 2)]
    one, two = (told_by(reader) for reader in readers)
    assert one == two
    assert len(one) == 60
    (path,) = files(cache)
    kept = PixelFile(path, (24, 24, 1))
    assert kept.is_filled.all()
    assert np.array_equal(kept.images, expected(uri))


@pytest.mark.parametrize("limit_bytes", [60 * (24 * 24 + 1), 100], ids=["half of the images", "none"])
def test_the_limit_holds_and_the_rest_is_decoded_each_time(uri, cache, decoded, limit_bytes):
    loader = Loader(open_dataset(uri), workers=0, memory=GPU, disk_bytes=limit_bytes, cache_bytes=1)
    for _ in range(2):
        decoded.clear()
        (batch,) = loader.epoch(BatchPlan("train", 120, 24, train=False))
        assert len(decoded) in ((120, 60) if limit_bytes > 100 else (120,))
        assert np.array_equal(batch.images, expected(uri))
    assert sum(path.stat().st_size for path in files(cache)) <= limit_bytes
    assert len(files(cache)) == (limit_bytes > 100)


def test_shards_that_are_still_to_be_copied_keep_their_room():
    assert opened(limit_bytes=1000, to_come={OTHER: 990}, num=100).capacity == 1
    assert opened(THIRD, limit_bytes=1000, to_come={OTHER: 1000}, num=100) is None


def test_a_new_file_evicts_the_least_recent_but_none_in_use(cache):
    opened(KEY)
    opened(OTHER)
    os.utime(cache / f"{KEY}.pixels", (time.time() + 5, time.time() + 5))  # used again
    opened(THIRD, limit_bytes=150)
    assert [path.stem for path in files(cache)] == [KEY, THIRD]
    used = opened(KEY)
    assert opened(OTHER, num=14, limit_bytes=150).capacity == (150 - 70) // 7  # THIRD goes, KEY stays
    assert [path.stem for path in files(cache)] == [KEY, OTHER]
    assert used.path.exists()


def test_files_of_an_earlier_boot_go_as_soon_as_room_is_taken(cache):
    opened(KEY)
    os.utime(cache / f"{KEY}.pixels", (1, 1))
    opened(OTHER)
    assert [path.stem for path in files(cache)] == [OTHER]


def test_a_file_gives_way_to_a_shard_unless_it_is_in_use(cache):
    class Entry:
        sha256, bytes, name = THIRD, 100, "train-00000"

    opened(KEY)
    used = opened(OTHER)
    with pytest.raises(ValueError, match="found the sha256"):  # the wrong bytes, but only once there was room for them
        NodeCache(200).copy(Entry(), lambda: iter([b"x" * 100]), mine=())
    assert [path.stem for path in files(cache)] == [OTHER]
    assert used.capacity == 10


def test_the_lock_goes_with_the_file(cache):
    file = opened()
    with (cache / "locks" / KEY).open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        del file
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
