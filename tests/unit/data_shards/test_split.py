"""Splits: disjoint in groups, fair in classes, repeatable, and loud where they cannot be."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from data_shards.split import LeakError, assign_splits, check_splits


@dataclass(frozen=True)
class Sample:
    labels: tuple[int, ...]
    group: str | None = None
    split: str | None = None


def drawn(rows, num_classes=3, seed=0, **options):
    options = {"val_fraction": 0.15, "test_fraction": 0.2, **options}
    return assign_splits(rows, num_classes=num_classes, seed=seed, **options)


def patients(num=200, seed=0):
    """Patients of 1 to 8 images, some with two diagnoses; the third class is rare."""
    rng = np.random.default_rng(seed)
    return [
        Sample((int(rng.choice(3, p=[0.6, 0.35, 0.05])),), f"patient {patient}")
        for patient in range(num)
        for _ in range(rng.integers(1, 9))
    ]


def test_no_group_stands_in_two_splits():
    rows = patients()
    homes = {}
    for row, split in zip(rows, drawn(rows), strict=True):
        assert homes.setdefault(row.group, split) == split


def test_each_split_gets_its_share_of_every_class():
    rows = patients()
    splits = drawn(rows)
    for label in range(3):
        counts = Counter(s for row, s in zip(rows, splits, strict=True) if row.labels == (label,))
        total = sum(counts.values())
        for split, fraction in (("train", 0.65), ("val", 0.15), ("test", 0.2)):
            assert counts[split] / total == pytest.approx(fraction, abs=max(0.02, 1.5 / total))


def test_the_seed_decides_and_the_same_seed_decides_alike():
    rows = patients()
    assert drawn(rows) == drawn(rows)
    assert drawn(rows) != drawn(rows, seed=1)


def test_groups_keep_their_split_when_rows_come_in_another_order():
    rows = patients()
    forward = {row.group: s for row, s in zip(rows, drawn(rows), strict=True)}
    backward = {row.group: s for row, s in zip(rows[::-1], drawn(rows[::-1]), strict=True)}
    assert forward == backward


def test_rows_without_a_group_are_split_one_by_one():
    rows = [Sample((i % 2,)) for i in range(1000)]
    assert Counter(drawn(rows, 2)) == {"train": 650, "val": 150, "test": 200}


def test_a_class_of_three_groups_reaches_all_three_splits():
    rows = [Sample((0,), f"a{i}") for i in range(100)] + [Sample((1,), f"b{i}") for i in range(3)]
    assert len({s for row, s in zip(rows, drawn(rows, 2), strict=True) if row.labels == (1,)}) == 3


def test_rows_with_several_labels_or_none_are_dealt_out_too():
    rng = np.random.default_rng(0)
    rows = [Sample(tuple(np.flatnonzero(rng.random(4) < 0.2).tolist()), f"g{i // 3}") for i in range(900)]
    counts = Counter(s for row, s in zip(rows, drawn(rows, 4), strict=True) if not row.labels)
    assert counts["test"] / sum(counts.values()) == pytest.approx(0.2, abs=0.05)


def test_given_splits_are_kept():
    rows = [Sample((i % 2,), split=split) for split in ("train", "test", "val") for i in range(4)]
    assert drawn(rows, 2) == [row.split for row in rows]


def test_with_only_train_and_test_val_is_drawn_by_group():
    rows = [replace(row, split="test" if int(row.group.split()[1]) % 3 == 0 else "train") for row in patients(600)]
    splits = drawn(rows)
    assert [s == "test" for s in splits] == [row.split == "test" for row in rows]
    given = Counter(row.split for row in rows)
    assert Counter(splits)["val"] / given["train"] == pytest.approx(0.15, abs=0.01)
    assert len({(row.group, s) for row, s in zip(rows, splits, strict=True)}) == 600
    assert drawn(rows) == splits != drawn(rows, seed=1)


def test_where_only_train_and_val_are_given_no_test_is_made_up():
    rows = [Sample((0,), split=split) for split in ("train", "val")]
    with pytest.raises(ValueError, match=r"train, val.* test is missing.*--data.split-values val=test"):
        drawn(rows, 1)


def test_a_group_in_two_given_splits_is_named():
    rows = [Sample((0,), f"g{i}", split) for i, split in enumerate(("train", "val", "test"))]
    with pytest.raises(LeakError, match="'g0' is in the splits train and test"):
        drawn([*rows, Sample((0,), "g0", "test")], 1)


def test_a_class_missing_from_a_split_is_named():
    rows = [Sample((0,), f"g{i}") for i in range(20)] + [Sample((1,), f"h{i}") for i in range(2)]
    with pytest.raises(ValueError, match="class 'wbc' is missing from the train split"):
        drawn(rows, 2, classes=("rbc", "wbc"))


def test_rows_of_which_only_some_have_a_split_are_refused():
    with pytest.raises(ValueError, match="1 of 2 rows have no split"):
        drawn([Sample((0,), split="train"), Sample((0,))], 1)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        check_splits([Sample((0,))], ["dev"], num_classes=1)
