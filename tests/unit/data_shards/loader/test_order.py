from __future__ import annotations

import numpy as np
import pytest
from epochs import epoch_of
from tiny_sets import npz_config

from data_shards.convert import convert
from data_shards.loader.mixture import mix
from data_shards.loader.order import even_quotas, mixed, shuffled, visits
from data_shards.manifest import Dataset, open_dataset
from data_shards.store import open_store


@pytest.fixture(scope="module")
def uris(tmp_path_factory) -> list[str]:
    """Three classes of 20, 5 and 2 images; and 30 images of two classes, one of them of the first set's."""
    folder = tmp_path_factory.mktemp("order")
    found = []
    for number, (counts, classes) in enumerate([((20, 5, 2), ("a", "b", "c")), ((15, 15), ("z", "b"))]):
        config = npz_config(folder / str(number), num={"train": sum(counts), "val": 6, "test": 6}, classes=classes)
        arrays = dict(np.load(config.source))
        arrays["train_labels"] = np.repeat(np.arange(len(counts)), counts).astype(np.uint8)[:, None]
        for split in ("val", "test"):
            arrays[f"{split}_labels"] = (np.arange(6) % len(counts)).astype(np.uint8)[:, None]
        np.savez(config.source, **arrays)
        found.append(str(folder / str(number) / "out"))
        convert(config, open_store(found[-1]))
    return found


@pytest.fixture
def datasets(uris) -> list[Dataset]:
    return [open_dataset(uri) for uri in uris]


def read(dataset, **options):
    return list(
        epoch_of(dataset, "train", **{"batch_size": 9, "micro_batch": 3, "image_size": 12, "train": True, **options})
    )


def test_a_mixed_order_keeps_quotas_and_repeats_only_after_all():
    pools = [np.arange(10), np.arange(10, 13), np.arange(13, 40)]
    order = mixed(pools, [10, 10, 5], 1, 2)
    counts = np.bincount(order, minlength=40)
    assert counts[:10].tolist() == [1] * 10
    assert sorted(counts[10:13].tolist()) == [3, 3, 4]
    assert counts[13:].sum() == 5
    assert counts[13:].max() == 1
    assert np.array_equal(order, mixed(pools, [10, 10, 5], 1, 2))
    left = {tuple(np.unique(mixed(pools, [10, 10, 5], 1, epoch)[0:25])) for epoch in range(5)}
    assert len(left) == 5
    assert len(set(np.flatnonzero(order < 10).tolist()) ^ set(range(10))) > 4  # scattered


def test_quotas_add_up_and_are_within_one_of_their_share():
    assert even_quotas(10, [1, 1, 1]) == [4, 3, 3]
    assert even_quotas(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
    assert even_quotas(0, [1, 2]) == [0, 0]
    for total in (1, 99, 1000):
        quotas = even_quotas(total, [3, 0.1, 2])
        assert sum(quotas) == total
        assert np.abs(np.array(quotas) - total * np.array([3, 0.1, 2]) / 5.1).max() < 1


def test_visits_count_how_often_a_sample_came_before():
    assert visits(np.array([3, 1, 3, 3, -1, 1, -1])).tolist() == [0, 0, 1, 2, 0, 1, 0]
    assert visits(shuffled(20, 0, 0)).tolist() == [0] * 20
    assert visits(np.empty(0, np.int64)).tolist() == []


def test_balanced_sampling_shows_each_class_equally_often(datasets):
    found = read(datasets[0], sampling="balanced")
    assert sum(len(batch.index) for batch in found) == 27
    assert np.concatenate([batch.labels for batch in found]).sum(0).tolist() == [9, 9, 9]


def test_a_sample_that_comes_again_has_other_random_numbers(datasets):
    found = read(datasets[0], sampling="balanced")
    chance = np.concatenate([batch.chance for batch in found])
    assert len(set(chance.tolist())) == 27
    assert (chance % 27 == np.concatenate([batch.index for batch in found])).all()


def test_balancing_a_multilabel_set_is_refused(datasets):
    datasets[0].index("train").labels[0] = 1
    with pytest.raises(ValueError, match=r"several classes or none; use 'shuffled'"):
        read(datasets[0], sampling="balanced")


def test_a_mixture_joins_classes_by_name(datasets):
    mixture = mix(datasets)
    assert mixture.classes == ("a", "b", "c", "z")
    assert mixture.index("train").labels.sum(0).tolist() == [20, 20, 2, 15]
    found = read(mixture, batch_size=57)
    alone = [list(epoch_of(d, "train", batch_size=1, image_size=12, train=False)) for d in datasets]
    images = np.concatenate([batch.images for one in alone for batch in one])
    for batch in found:
        assert np.array_equal(batch.images, images[batch.index])
        assert np.array_equal(batch.labels, mixture.index("train").labels[batch.index])


def test_weights_share_out_the_places_of_an_epoch(datasets):
    found = np.concatenate([batch.index for batch in read(mix(datasets, [2, 1]), batch_size=57)])
    assert (np.count_nonzero(found < 27), np.count_nonzero(found >= 27)) == (38, 19)
    evaluated = list(epoch_of(mix(datasets, [2, 1]), "train", batch_size=57, image_size=12, train=False))
    assert sorted(evaluated[0].index.tolist()) == list(range(57))


@pytest.mark.parametrize("kind", ["balanced", "mixture", "balanced mixture"])
def test_other_orders_too_are_equal_on_any_ranks_and_resume(uris, kind):
    def opened():
        datasets = [open_dataset(uri) for uri in uris]
        return mix(datasets, None if "balanced" in kind else [1, 3]) if "mixture" in kind else datasets[0]

    options = {"sampling": "balanced" if "balanced" in kind else "shuffled", "seed": 3, "epoch": 1}
    whole = read(opened(), **options)
    three = [read(opened(), rank=rank, ranks=3, **options) for rank in range(3)]
    assert [(b.images.tobytes(), b.chance.tolist()) for b in whole] == [
        (three[rank][turn].images.tobytes(), three[rank][turn].chance.tolist())
        for turn in range(len(three[0]))
        for rank in range(3)
    ]
    for done in range(0, len(whole), 3):
        rest = read(opened(), start=3 * done, workers=2, processes=done == 3, **options)
        assert [batch.images.tobytes() for batch in rest] == [batch.images.tobytes() for batch in whole[done:]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1], "for 2 datasets: give each a positive number"), ([1, 0], "leave out unwanted datasets")],
    ids=["too few", "nothing"],
)
def test_weights_that_make_no_sense_are_refused(datasets, weights, message):
    with pytest.raises(ValueError, match=message):
        mix(datasets, weights)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a mixture of 0 datasets"):
        mix([])
