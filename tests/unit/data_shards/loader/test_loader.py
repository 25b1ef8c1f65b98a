from __future__ import annotations

import contextlib
import hashlib
import io
import random
import weakref

import numpy as np
import pytest
from epochs import epoch_of
from PIL import Image
from tiny_sets import coded, npz_config, pixels

from data_shards.convert import convert
from data_shards.loader import BatchPlan, GpuMemory, Loader
from data_shards.loader.local_shard import ShardError
from data_shards.loader.node_cache import cache_folder
from data_shards.loader.pixels import Crop, stretched
from data_shards.manifest import Dataset, open_dataset
from data_shards.store import open_store


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("loader")
    convert(npz_config(folder), open_store(str(folder / "out")))
    return str(folder / "out")


@pytest.fixture
def dataset(uri) -> Dataset:
    return open_dataset(uri)


def fingerprint(batch) -> str:
    arrays = (batch.images, batch.labels, batch.index, batch.chance, batch.mask)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def global_batches(dataset, split, ranks, **options) -> list[list[str]]:
    """Fingerprints of the micro-batches of every global batch, in their order in it."""
    per_rank = [list(epoch_of(dataset, split, rank=rank, ranks=ranks, **options)) for rank in range(ranks)]
    return in_order(per_rank, options["batch_size"] // (options["micro_batch"] * ranks))


def in_order(per_rank: list[list], num_turns: int) -> list[list[str]]:
    """The micro-batches of every rank as fingerprints of global batches, of which each rank has so many of each."""
    ranks = len(per_rank)
    assert len({len(found) for found in per_rank}) == 1
    num_batches = len(per_rank[0]) // num_turns
    return [
        [fingerprint(per_rank[rank][j * num_turns + turn]) for turn in range(num_turns) for rank in range(ranks)]
        for j in range(num_batches)
    ]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_global_batches_are_the_same_on_1_2_and_4_ranks(uri, train):
    options = {"batch_size": 12, "micro_batch": 3, "image_size": 16, "train": train, "seed": 5}
    for epoch in (0, 1):
        one, two, four = (
            global_batches(open_dataset(uri), "train", ranks, epoch=epoch, **options) for ranks in (1, 2, 4)
        )
        assert one == two == four
        assert len(one) == (4 if train else 5)


@pytest.mark.parametrize("crop", [None, Crop(0.3)], ids=["whole", "parts"])
@pytest.mark.parametrize(
    ("workers", "processes"), [(0, None), (1, True), (2, True), (4, False)],
    ids=["0 workers", "1 process", "2 processes", "4 threads"],
)  # fmt: skip
def test_random_ranks_workers_and_resumes_change_no_bit(uri, crop, workers, processes):
    dataset, plan = open_dataset(uri), BatchPlan("train", 12, 16, train=True, micro_batch=1, crop=crop)
    chance = random.Random(workers)
    how = {"workers": workers, "processes": processes, "cache_bytes": 0}  # everything is decoded in each epoch
    with contextlib.ExitStack() as stack:
        stored = stack.enter_context(Loader(dataset, workers=0))
        loaders = {
            ranks: [stack.enter_context(Loader(dataset, rank=rank, ranks=ranks, **how)) for rank in range(ranks)]
            for ranks in (1, 2, 3, 4)
        }

        def found(ranks: int, epoch: int, start: int) -> list[list[str]]:
            return in_order([list(each.epoch(plan, epoch, start=start)) for each in loaders[ranks]], 12 // ranks)

        for epoch in (0, 1):
            expected = in_order([list(stored.epoch(plan, epoch))], 12)  # in memory from the epoch before
            for ranks in loaders:
                assert found(ranks, epoch, 0) == expected
            for _ in range(5):
                done, ranks = chance.randrange(4), chance.choice(list(loaders))
                assert found(ranks, epoch, 12 * done) == expected[done:]


def test_workers_are_processes_where_there_is_much_to_decode(dataset, monkeypatch):
    options = {"batch_size": 10, "image_size": 16, "train": True}
    loader = Loader(dataset, workers=2)
    few = epoch_of(loader, "train", **options)
    assert not few.decodes_in_processes
    assert few.pixels.decoding_s(np.arange(50)) == pytest.approx(50 * (60e-6 + 144 * 2.5e-9))
    monkeypatch.setattr("data_shards.loader.epoch.PROCESSES_FROM_S", 0.001)
    assert few.decodes_in_processes
    assert not epoch_of(dataset, "train", workers=0, **options).decodes_in_processes
    assert not epoch_of(dataset, "train", workers=2, processes=False, **options).decodes_in_processes
    list(few)
    assert not few.decodes_in_processes  # all of it is in memory now
    loader.close()


def test_random_crops_change_by_epoch_and_are_not_cached(dataset):
    options = {"batch_size": 50, "image_size": 8, "train": True, "crop": Crop(0.2)}
    first, second = (next(iter(epoch_of(dataset, "train", epoch=epoch, **options))) for epoch in (0, 1))
    again = next(iter(epoch_of(dataset, "train", epoch=0, **options)))
    by_sample = [batch.images[np.argsort(batch.index)] for batch in (first, second, again)]
    assert np.array_equal(by_sample[0], by_sample[2])
    assert (by_sample[0] != by_sample[1]).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("processes", [True, False], ids=["processes", "threads"])
def test_batches_may_be_made_in_memory_of_the_callers_choice(uri, processes):
    made = []

    def empty(shape: tuple[int, ...]) -> np.ndarray:
        made.append(np.full(shape, 77, np.uint8))
        return made[-1]

    options = {"batch_size": 10, "image_size": 16, "train": False, "workers": 1, "processes": processes}
    for _ in range(2):  # the second time from memory
        found = list(epoch_of(dataset := open_dataset(uri), "train", memory=GpuMemory(empty), **options))
        assert all(any(batch.images is array for array in made) for batch in found)
        assert [fingerprint(b) for b in found] == [fingerprint(b) for b in epoch_of(dataset, "train", **options)]


def test_training_shows_a_sample_at_most_once_and_drops_the_rest(dataset):
    found = list(epoch_of(dataset, "train", batch_size=12, image_size=16, train=True))
    positions = np.concatenate([batch.index for batch in found])
    assert len(positions) == len(set(positions.tolist())) == 48
    assert all(batch.mask.all() for batch in found)
    assert [batch.consumed for batch in found] == [12, 24, 36, 48]


def test_seed_and_epoch_decide_the_order(dataset):
    def order(**options):
        found = epoch_of(dataset, "train", batch_size=25, image_size=16, train=True, **options)
        return tuple(np.concatenate([batch.index for batch in found]).tolist())

    assert len({order(), order(epoch=1), order(seed=1), order(seed=1, epoch=1)}) == 4
    assert order(seed=1) == order(seed=1)


def test_the_order_is_the_same_for_ever(dataset):
    """A resume by a later version, on another machine, must go on in the same permutation."""
    first = next(iter(epoch_of(dataset, "train", batch_size=8, image_size=16, train=True, seed=3, epoch=2)))
    draws = np.random.PCG64(np.random.SeedSequence([3, 2])).random_raw(50)
    assert first.index.tolist() == np.argsort(draws, kind="stable")[:8].tolist() == [4, 19, 10, 46, 0, 44, 8, 5]


def test_evaluation_shows_every_sample_once_and_pads_with_a_mask(dataset):
    for ranks in (1, 2):
        found = [
            b
            for r in range(ranks)
            for b in epoch_of(
                dataset, "test", batch_size=8, micro_batch=4, rank=r, ranks=ranks, image_size=16, train=False
            )
        ]
        positions = np.concatenate([batch.index for batch in found])
        mask = np.concatenate([batch.mask for batch in found])
        assert sorted(positions[mask].tolist()) == list(range(14))
        assert (positions[~mask] == -1).all()
        assert len(positions) == 16
        for batch in found:
            assert not batch.images[~batch.mask].any()
            assert not batch.labels[~batch.mask].any()
            assert np.array_equal(batch.labels[batch.mask], dataset.index("test").labels[batch.index[batch.mask]])
        assert max(batch.consumed for batch in found) == 14


def test_a_batch_may_be_larger_than_the_split_in_evaluation(dataset):
    (batch,) = epoch_of(dataset, "val", batch_size=32, image_size=16, train=False)
    assert batch.mask.tolist() == [True] * 9 + [False] * 23


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_at_any_batch_the_rest_is_bit_equal(uri, train, ranks):
    options = {
        "batch_size": 12,
        "micro_batch": 3,
        "image_size": 16,
        "train": train,
        "seed": 1,
        "epoch": 3,
        "ranks": ranks,
    }
    whole = list(epoch_of(open_dataset(uri), "train", **options))
    turns = 12 // (3 * ranks)
    for done in range(0, len(whole) + 1, turns):
        start = whole[done - 1].consumed if done else 0
        rest = epoch_of(open_dataset(uri), "train", start=start, **options)
        assert len(rest) == len(whole) - done
        assert [fingerprint(batch) for batch in rest] == [fingerprint(batch) for batch in whole[done:]]


def test_what_was_skipped_is_not_decoded(dataset, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "data_shards.loader.pixels.stretched", lambda *a: decoded.append(1) or np.zeros((16, 16, 1), np.uint8)
    )
    list(epoch_of(dataset, "train", batch_size=10, image_size=16, train=True, start=40))
    assert len(decoded) == 10


def test_len_is_the_number_of_micro_batches_of_this_rank(dataset):
    options = {"batch_size": 12, "micro_batch": 3, "image_size": 16, "train": True}
    assert len(epoch_of(dataset, "train", **options)) == 16
    assert len(epoch_of(dataset, "train", rank=1, ranks=2, **options)) == 8
    assert len(epoch_of(dataset, "train", start=36, **options)) == 4


def test_the_second_epoch_comes_from_a_bounded_memory_cache(dataset, monkeypatch):
    from data_shards.loader import pixels

    decoded = []
    monkeypatch.setattr(pixels, "stretched", lambda *a: decoded.append(1) or stretched(*a))
    plan, loader = BatchPlan("train", 25, 16, train=True), Loader(dataset)
    for epoch, number in ((0, 50), (1, 0)):
        decoded.clear()
        list(loader.epoch(plan, epoch))
        assert len(decoded) == number
    small = Loader(dataset, cache_bytes=20 * 16 * 16)
    for epoch, number in ((0, 50), (1, 30)):
        decoded.clear()
        found = [fingerprint(batch) for batch in small.epoch(plan, epoch)]
        assert len(decoded) == number
        assert found == [fingerprint(batch) for batch in loader.epoch(plan, epoch)]


def test_a_loader_that_is_closed_or_dropped_frees_its_memory(dataset):
    plan, loader = BatchPlan("train", 25, 16, train=True), Loader(dataset)
    with loader:
        epoch = loader.epoch(plan)
        list(epoch)
        kept = weakref.ref(epoch.pixels)
        del epoch
        assert kept() is not None
    assert kept() is None
    gone = weakref.ref(loader)
    del loader
    assert gone() is None


def test_images_are_read_at_positions_of_the_callers_choice(dataset):
    with Loader(dataset) as loader:
        (batch,) = loader.epoch(BatchPlan("val", 9, 16, train=False))
        assert np.array_equal(loader.read("val", np.array([7, 0, 7]), image_size=16), batch.images[[7, 0, 7]])


@pytest.mark.parametrize("size", [16, (20, 9)], ids=["square", "height x width"])
def test_images_are_resized_by_pils_bilinear_filter(dataset, size):
    height, width = (size, size) if isinstance(size, int) else size
    (batch,) = epoch_of(dataset, "val", batch_size=9, image_size=size, train=False)
    index = dataset.index("val")
    for row, position in enumerate(batch.index):
        tar = dataset.store.get(f"shards/{dataset.manifest.shards[index.shard[position]].name}.tar")
        image = Image.open(io.BytesIO(tar[index.offset[position] :][: index.size[position]]))
        expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        assert np.array_equal(batch.images[row, :, :, 0], expected)


def test_grey_is_repeated_where_the_dataset_is_rgb():
    found = stretched(coded(pixels(1)), 12, 15, 3)
    assert found.shape == (12, 15, 3)
    assert all(np.array_equal(found[:, :, channel], pixels(1)) for channel in range(3))


def test_a_flipped_byte_in_a_shard_is_an_error_that_names_it(tmp_path):
    config, store = npz_config(tmp_path), open_store(str(tmp_path / "out"))
    convert(config, store)
    data = bytearray(store.get("shards/train-00002.tar"))
    data[len(data) // 2] ^= 4
    store.put("shards/train-00002.tar", bytes(data))
    with pytest.raises(ShardError, match=r"shards/train-00002\.tar .* under another --run"):
        list(epoch_of(open_dataset(store), "train", batch_size=25, image_size=16, train=True))
    store.delete("manifest.json")  # the remedy the message gives
    store.delete("shards/train-00002.tar")
    assert convert(config, store)["made"] == 1
    assert len(list(epoch_of(open_dataset(store), "train", batch_size=25, image_size=16, train=True))) == 2


@pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
def test_a_shard_that_is_not_whole_is_an_error(tmp_path, damage):
    store = open_store(str(tmp_path / "out"))
    convert(npz_config(tmp_path), store)
    data = store.get("shards/val-00000.tar")
    store.delete("shards/val-00000.tar")
    if damage != "missing":
        store.put("shards/val-00000.tar", data[: 0 if damage == "empty" else -512])
    with pytest.raises(ShardError, match=r"shards/val-00000\.tar"):
        list(epoch_of(open_dataset(store), "val", batch_size=3, image_size=16, train=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 51}, "has 50 samples, but a training batch needs 51.*at most 50"),
        (
            {"batch_size": 10, "micro_batch": 3},
            "10 samples cannot be cut evenly into 1 ranks x micro-batches of 3.*multiple of 3",
        ),
        ({"batch_size": 10, "ranks": 4}, "cannot be cut evenly into 4 ranks.*multiple of 4"),
        ({"batch_size": 10, "start": 5}, "start is 5.*multiple of 10 up to 50"),
        ({"batch_size": 10, "start": 60}, "start is 60"),
        ({"batch_size": 10, "rank": 2, "ranks": 2}, "rank is 2"),
        ({"batch_size": 0}, "at least 1"),
    ],
    ids=str,
)
def test_impossible_wishes_are_refused_before_the_first_batch(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        epoch_of(dataset, "train", image_size=16, train=True, **options)


def test_s3_batches_equal_a_folders_and_damage_is_refused(tmp_path, s3, monkeypatch, uri, dataset):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = open_store(f"{s3}/tiny")
    for key in dataset.store.list():
        remote.put(key, dataset.store.get(key))
    options = {"batch_size": 25, "image_size": 16, "train": True}
    expected = [fingerprint(batch) for batch in epoch_of(dataset, "train", **options)]
    for _ in range(2):
        assert [fingerprint(batch) for batch in epoch_of(open_dataset(remote), "train", **options)] == expected
    copies = sorted(cache_folder().glob("*.tar"))
    assert len(copies) == sum(shard.name.startswith("train") for shard in dataset.manifest.shards)
    copies[0].write_bytes(copies[0].read_bytes()[:-1] + b"x")
    assert [fingerprint(batch) for batch in epoch_of(open_dataset(remote), "train", **options)] == expected
