"""The table of classes and splits: right for several labels, for records of earlier code, and on 80 columns."""

import json

import pytest
from finished_run import FACTS, finish
from PIL import Image

from data_shards.config import DataConfig, DuplicatesConfig
from data_shards.convert import convert
from data_shards.store import open_store
from pipelines.cli import main
from pipelines.commands.class_table import completed, print_classes
from pipelines.recipes import Recipe
from pipelines.steps.shard import logged

AS_THEY_ARE = DuplicatesConfig(across="report")
LABELS = ("edema", "mass", "edema|mass", "")


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory):
    """A store with a finished dataset of 48 images, and its facts: every fourth image has two labels, one has none."""
    folder = tmp_path_factory.mktemp("set")
    lines = ["file,label,part"]
    for i in range(48):
        Image.effect_noise((16, 16), 40 + i).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{LABELS[i % 4]},{('train', 'train', 'val', 'test')[i // 4 % 4]}")
    (folder / "t.csv").write_text("\n".join(lines))
    config = DataConfig(
        dataset="mine",
        layout="table",
        source=str(folder),
        task="multilabel",
        split_column="part",
        duplicates=AS_THEY_ARE,
    )
    store = open_store(str(tmp_path_factory.mktemp("store")))
    return store, {**convert(config, store.at("datasets", "mine", "default")), "data": "datasets/mine/default"}


def cells(text):
    """{first cell: the other cells} of the printed table."""
    lines = [line.split("│") for line in text.splitlines() if "│" in line]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_images_with_several_labels_are_counted_once_per_split(multilabel, capsys):
    _, facts = multilabel
    assert facts["samples"] == {"train": 24, "val": 12, "test": 12}
    print_classes(facts)
    printed = capsys.readouterr().out
    assert cells(printed) == {
        "edema": ["12", "6", "6", "24"], "mass": ["12", "6", "6", "24"], "all images": ["24", "12", "12", "48"],
    }  # fmt: skip
    assert "counted in each of them" in printed


def test_mlflow_is_given_images_not_labels(multilabel):
    _, facts = multilabel
    told = logged(facts)
    assert [told[f"num_{split}"] for split in ("train", "val", "test")] == [24, 12, 12]
    assert told["num_images"] == 48


def test_a_record_of_earlier_code_is_completed_from_the_manifest(multilabel):
    store, facts = multilabel
    old = {key: value for key, value in facts.items() if key not in ("samples", "task", "splits_from")}
    assert completed(old, store) == {**old, "samples": facts["samples"], "task": "multilabel"}


def test_sums_replace_a_missing_manifest_only_where_right(tmp_path):
    gone = open_store(str(tmp_path))
    assert completed(FACTS["shard"], gone)["samples"] == {"val": 2, "train": 10}
    assert "samples" not in completed({**FACTS["shard"], "num_images": 9}, gone)


def test_a_finished_run_of_earlier_code_prints_its_table(multilabel, capsys):
    store, facts = multilabel
    old = {key: value for key, value in facts.items() if key not in ("samples", "task", "splits_from")}
    finish(store.uri, "old", Recipe(), workflow="direct", last="shard", shard=old)
    again = ["shard", "--run", "old", "--store", store.uri]
    assert main(again) == 0
    printed = capsys.readouterr().out
    assert "(train 24, val 12, test 12)" in printed
    assert cells(printed)["all images"] == ["24", "12", "12", "48"]
    assert main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shard"]["samples"] == {"train": 24, "val": 12, "test": 12}


def test_twenty_long_class_names_fit_80_columns_unfolded(capsys):
    names = [f"class {i}" for i in range(18)] + ["a very long name " * 9, "x" * 150]
    counts = {split: dict.fromkeys(names, 1234567) for split in ("train", "val", "test")}
    print_classes({"counts": counts, "samples": dict.fromkeys(counts, 7), "splits_from": "train and test from " * 9})
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count("1,234,567") == 60
    assert "".join(line.partition("│")[0].strip() for line in printed.splitlines() if "xx" in line) == "x" * 150


def test_unreadable_folders_are_refused_before_the_run_is_named(tmp_path, capsys):
    for outer in ("benign", "malignant"):
        for inner in ("40X", "100X"):
            (tmp_path / "set" / outer / inner).mkdir(parents=True)
            (tmp_path / "set" / outer / inner / "a.png").write_bytes(b"x")
    store = tmp_path / "store"
    command = ["shard", "--recipe", "quickstart", "--data.dataset", "mine", "--data.layout", "folders"]
    assert main([*command, "--data.source", str(tmp_path / "set"), "--store", str(store)]) == 1
    assert "--data.classes benign malignant" in capsys.readouterr().err
    assert not (store / "runs").exists()
