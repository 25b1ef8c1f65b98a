from __future__ import annotations

import re
from collections import Counter

import pytest
from tiny_sets import in_memory_set

from data_shards.config import DataConfig
from data_shards.plan import config_digest, digest_of, plan_shards, sample_key, shard_digest
from data_shards.renamed import stored_values
from data_shards.source import Row

CONFIG = DataConfig(dataset="tiny", layout="folders", source="/somewhere", samples_per_shard=4)


def rows_and_splits(num: int = 30):
    rows = in_memory_set(num).rows
    return rows, ["train" if i % 3 else ("val" if i % 2 else "test") for i in range(num)]


def test_every_row_stands_in_exactly_one_shard_of_its_split():
    rows, splits = rows_and_splits()
    plans = plan_shards(rows, splits, CONFIG)
    planned = [(planned.row, plan.split) for plan in plans for planned in plan.rows]
    assert Counter(planned) == Counter(zip(rows, splits, strict=True))
    assert [plan.name for plan in plans if plan.split == "train"] == [f"train-{i:05d}" for i in range(5)]


def test_the_plan_does_not_depend_on_the_order_of_the_rows():
    rows, splits = rows_and_splits()
    assert plan_shards(rows, splits, CONFIG) == plan_shards(rows[::-1], splits[::-1], CONFIG)


def test_shards_of_a_split_differ_by_at_most_one_sample():
    rows, _ = rows_and_splits(21)
    sizes = [len(plan.rows) for plan in plan_shards(rows, ["train"] * 21, CONFIG)]
    assert max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 1


def test_the_seed_decides_the_order():
    rows, splits = rows_and_splits()
    other = CONFIG.model_copy(update={"seed": 1})
    assert plan_shards(rows, splits, CONFIG) != plan_shards(rows, splits, other)


def test_a_prefix_of_shards_is_a_mixture_of_the_rows():
    rows = [Row(where=f"{i:04d}", frame=0, labels=(i // 500,), split=None, group=None) for i in range(1000)]
    first = plan_shards(rows, ["train"] * 1000, CONFIG.model_copy(update={"samples_per_shard": 200}))[0]
    assert 70 < sum(planned.row.labels[0] for planned in first.rows) < 130


def test_keys_are_20_hex_digits_of_dataset_salt_path_and_frame():
    keys = {
        sample_key(*parts)
        for parts in [("d", "", "a", 0), ("e", "", "a", 0), ("d", "s", "a", 0), ("d", "", "b", 0), ("d", "", "a", 1)]
    }
    assert len(keys) == 5
    assert all(re.fullmatch("[0-9a-f]{20}", key) for key in keys)
    assert sample_key("ab", "c", "x", 0) != sample_key("a", "bc", "x", 0)


def test_a_row_without_a_group_is_a_group_of_its_own():
    rows = [Row(where=w, frame=0, labels=(0,), split=None, group=g) for w, g in [("a", None), ("b", "g"), ("c", "g")]]
    (plan,) = plan_shards(rows, ["train"] * 3, CONFIG)
    groups = {planned.row.where: planned.group for planned in plan.rows}
    assert groups["b"] == groups["c"] != groups["a"]


def test_one_image_listed_twice_is_an_error_that_names_it():
    row = in_memory_set(1).rows[0]
    with pytest.raises(ValueError, match=re.escape(f"{row.where!r} (frame 0) appears twice")):
        plan_shards([row, row], ["train", "val"], CONFIG)


def test_the_settings_digest_ignores_name_source_and_tolerance():
    same = CONFIG.model_copy(update={"name": "other", "source": "/elsewhere", "max_quarantine": 0.5})
    assert config_digest(same) == config_digest(CONFIG)
    for change in ({"salt": "x"}, {"samples_per_shard": 5}, {"max_side": 100}, {"seed": 3}, {"dataset": "y"}):
        assert config_digest(CONFIG.model_copy(update=change)) != config_digest(CONFIG)


def test_a_shard_of_another_source_is_another_shard():
    rows, splits = rows_and_splits()
    plan = plan_shards(rows, splits, CONFIG)[0]
    assert shard_digest(plan, CONFIG) != shard_digest(plan, CONFIG.model_copy(update={"source": "/elsewhere"}))


def test_defaults_are_not_in_the_digest_so_new_ones_move_nothing():
    assert config_digest(DataConfig(samples_per_shard=10_000)) == config_digest(DataConfig())
    assert config_digest(DataConfig()) == digest_of([2, {}])


def test_no_default_that_decides_bytes_has_changed():
    """Datasets made with the old default would keep their version, although they could not be made again."""
    assert stored_values(DataConfig()) == {
        "dataset": "phantoms", "name": "default", "source": "", "layout": "catalog", "classes": [], "task": "catalog",
        "csv": "", "image_column": "", "label_column": "", "group_column": "", "split_column": "",
        "split_values": [], "split_folders": "keep", "rows_without_file": "refuse",
        "drop_classes": [], "class_map": [], "label_separator": "|", "no_finding": "", "group_pattern": "",
        "metadata_columns": [],
        "val_fraction": 0.15, "test_fraction": 0.2, "seed": 0, "salt": "", "max_side": None, "max_quarantine": 0.01,
        "samples_per_shard": 10_000, "shard_bytes": 256_000_000,
        "leaks": {
            "near": 12, "symmetries": "off", "across": "auto", "within": "report", "labels": "report",
            "datasets": "report",
        },
        "dicom": {"frames": "each", "window": None, "view": 0, "identifying": "set-aside", "objects": "quarantine"},
        "phantoms": {
            "num_patients": 300, "images_per_patient": 4, "side": 64, "speckle": 0.3, "contrast": [0.5, 0.85],
        },
    }, "give a new setting a default that means the bytes of before, or raise plan._DEFAULTS"  # fmt: skip
