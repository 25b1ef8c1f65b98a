"""`medmamba shards names, quarantine, duplicates --names`: from keys to files, which never enter the store."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert, key_map
from data_shards.duplicates import REPORT
from data_shards.manifest import open_dataset
from data_shards.store import Store, open_store
from pipelines.cli import main

NUM = 24


def write_image(path: Path, number: int) -> None:
    """Smooth structure, unlike any other number's."""
    small = np.random.default_rng(number).integers(0, 256, (10, 10), dtype=np.uint8)
    Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(path)


def write_folders(folder: Path) -> Path:
    """Two classes; one image of `cat` three times, one of `dog` torn."""
    for c, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(NUM):
            write_image(folder / name / f"Miller {i}.png", 100 * c + i)
    for i in range(2):
        write_image(folder / "cat" / f"again {i}.png", 3)
    (folder / "dog" / "torn.png").write_bytes(b"no image")
    return folder


def config_of(source: Path, **changes) -> DataConfig:
    settings = {"dataset": "pets", "layout": "folders", "source": str(source), "max_quarantine": 0.1}
    return DataConfig(**{**settings, **changes})


def made(root: Path, config: DataConfig) -> Store:
    """A store that holds the dataset of `config`, and the run that made it."""
    store = open_store(str(root))
    convert(config, store.at("datasets", config.dataset, config.name))
    kept = {"workflow": "direct", "recipe": {"data": config.model_dump(mode="json")}}
    store.at("runs", "mine").put("workflow.json", json.dumps(kept).encode())
    return store


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def config(source) -> DataConfig:
    return config_of(source, salt="pepper", duplicates={"within": "drop"})


@pytest.fixture(scope="module")
def store(tmp_path_factory, config) -> Store:
    return made(tmp_path_factory.mktemp("store"), config)


def asked(capsys, *argv: str, code: int = 0) -> str:
    assert main(["shards", *argv]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else " ".join(captured.err.split())


def asked_json(capsys, *argv: str) -> dict:
    return json.loads(asked(capsys, *argv, "--json"))


def test_every_sample_has_its_path_frame_split_label_and_state(store, config, source, capsys):
    told = asked_json(capsys, "names", "--store", store.uri)
    assert {(s["key"], s["path"], s["frame"]) for s in told["samples"]} == set(key_map(config))
    assert (told["dataset"], told["without_file"], told["not_in_dataset"]) == ("pets/default", 0, 0)
    by_path = {s["path"]: s for s in told["samples"]}
    index = {
        split: set(open_dataset(store.at("datasets/pets/default")).index(split).key)
        for split in ("train", "val", "test")
    }
    for path, sample in by_path.items():
        assert sample["label_names"] == [path.partition("/")[0]]
        assert Path(sample["file"]) == source / path
        assert sample["state"] != "in shard" or sample["key"] in index[sample["split"]]
    assert (by_path["dog/torn.png"]["state"], by_path["dog/torn.png"]["reason"]) == (
        "quarantined",
        "a text, not an image",
    )
    dropped = {path: sample for path, sample in by_path.items() if sample["state"] == "dropped"}
    assert set(dropped) == {"cat/again 0.png", "cat/again 1.png"}
    assert {sample["reason"] for sample in dropped.values()} == {"duplicate (exact) within a split"}
    assert {sample["split"] for sample in dropped.values()} <= {"train", "val", "test"}


def test_keys_and_their_shown_beginnings_are_found(store, config, capsys):
    places = {key: path for key, path, _ in key_map(config)}
    one, two = list(places)[:2]
    told = asked_json(capsys, "names", "pets", one, two[:8].upper(), "--store", store.uri)
    assert {(s["key"], s["path"]) for s in told["samples"]} == {(one, places[one]), (two, places[two])}
    told = asked_json(capsys, "names", one[:8], "--store", store.uri)  # the only dataset need not be named
    assert [s["path"] for s in told["samples"]] == [places[one]]
    assert places[two] in asked(capsys, "names", "--keys", two, "--store", store.uri)


def test_a_long_list_counts_hidden_rows_and_all_shows_them(store, capsys):
    num = 2 * NUM + 3
    told = asked(capsys, "names", "--store", store.uri)
    assert f"and {num - 20} more" in told
    assert "--all" in told
    told = asked(capsys, "names", "--all", "--store", store.uri)
    assert "more" not in told
    assert told.count(".png") == num


def test_the_csv_joins_the_predictions_in_one_line_of_pandas(store, config, tmp_path, capsys):
    target = tmp_path / "names.csv"
    assert f"{2 * NUM + 3} samples" in asked(capsys, "names", "--out", str(target), "--store", store.uri)
    keys = open_dataset(store.at("datasets/pets/default")).index("test").key.tolist()
    predictions = pd.DataFrame({"key": keys, "scores": [[0.5, 0.5]] * len(keys)})
    joined = predictions.merge(pd.read_csv(target, dtype={"key": str}), on="key")
    places = {key: path for key, path, _ in key_map(config)}
    assert joined.path.tolist() == [places[key] for key in keys]
    assert set(joined.split) == {"test"}
    assert asked(capsys, "names", "--out", str(target), "--store", store.uri)  # its own file is replaced


def test_odd_names_are_spelled_out_and_kept_in_the_csv(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # else a long name takes two lines where the path of the test is long
    folder = write_folders(tmp_path / "set")
    write_image(folder / "cat" / "\x1b[2Jred\n.png", 900)
    bad = bytes(folder / "cat") + b"/\xff.png"
    shutil.copy(bytes(folder / "cat" / "Miller 5.png"), bad)
    store = made(tmp_path / "store", config_of(folder))
    told = asked(capsys, "names", "--all", "--store", store.uri)
    assert r"\x1b[2Jred\n.png" in told
    assert r"\udcff.png" in told
    assert "\x1b" not in told
    asked(capsys, "names", "--out", str(tmp_path / "names.csv"), "--store", store.uri)
    with (tmp_path / "names.csv").open(newline="", errors="surrogateescape") as file:
        paths = {row["path"] for row in csv.DictReader(file)}
    assert {"cat/\x1b[2Jred\n.png", "cat/\udcff.png"} <= paths


def test_a_changed_source_is_accepted_and_changes_are_counted(tmp_path, capsys):
    folder = write_folders(tmp_path / "set")
    store = made(tmp_path / "store", config_of(folder))
    (folder / "cat" / "Miller 1.png").unlink()
    (folder / "cat" / "Miller 2.png").rename(folder / "cat" / "renamed.png")
    write_image(folder / "dog" / "new.png", 800)
    told = asked_json(capsys, "names", "--store", store.uri)
    assert (told["without_file"], told["not_in_dataset"]) == (2, 2)
    assert sum(sample["path"] is None for sample in told["samples"]) == 2
    shown = asked(capsys, "names", "--store", store.uri)
    assert f"2 of {2 * NUM + 3} samples without a file in the source" in shown
    assert "2 images of the source not in the dataset: added later" in shown


@pytest.mark.parametrize("emptied", ["removed", "left empty"])
def test_a_source_refused_by_now_still_gives_its_files(tmp_path, capsys, emptied):
    folder = write_folders(tmp_path / "set")
    store = made(tmp_path / "store", config_of(folder, classes=("cat", "dog")))
    shutil.rmtree(folder / "dog")
    if emptied == "left empty":
        (folder / "dog").mkdir()
    told = asked_json(capsys, "names", "--store", store.uri)
    assert told["without_file"] == NUM + 1
    assert {s["path"].partition("/")[0] for s in told["samples"] if s["path"]} == {"cat"}
    assert "dog" in told["notes"][0]


def test_a_moved_source_is_asked_for_and_found_with_source(tmp_path, capsys):
    folder = write_folders(tmp_path / "set")
    store = made(tmp_path / "store", config_of(folder))
    folder.rename(tmp_path / "moved")
    told = asked(capsys, "names", "--store", store.uri, code=2)
    assert str(folder) in told
    assert "--source" in told
    told = asked_json(capsys, "names", "--source", str(tmp_path / "moved"), "--store", store.uri)
    assert told["without_file"] == 0
    assert told["samples"][0]["file"].startswith(str(tmp_path / "moved"))


def test_an_unrecorded_salt_is_required_and_a_wrong_one_refused(tmp_path, capsys, config):
    store = open_store(str(tmp_path))
    convert(config, store.at("datasets/pets/default"))
    assert "give it with --salt" in asked(capsys, "names", "--store", store.uri, code=2)
    assert "does not match" in asked(capsys, "names", "--salt", "peper", "--store", store.uri, code=2)
    told = asked_json(capsys, "names", "--salt", "pepper", "--store", store.uri)
    assert told["without_file"] == 0


def zipped(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def tarred(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "tar", folder))


def wrapped(folder: Path) -> Path:
    (folder.parent / "outer").mkdir()
    folder.rename(folder.parent / "outer" / "wrapper")
    return folder.parent / "outer"


@pytest.mark.parametrize("packed", [zipped, tarred, wrapped])
def test_archives_and_wrappers_give_inner_path_and_address(tmp_path, capsys, packed):
    source = packed(write_folders(tmp_path / "set"))
    config = config_of(source)
    store = made(tmp_path / "store", config)
    told = asked_json(capsys, "names", "--store", store.uri)
    assert {(s["key"], s["path"], s["frame"]) for s in told["samples"]} == set(key_map(config))
    inner = f"{source}/wrapper" if packed is wrapped else str(source)
    assert {s["file"] for s in told["samples"]} == {f"{inner}/{s['path']}" for s in told["samples"]}


def test_a_table_in_a_subfolder_names_files_relative_to_itself(tmp_path, capsys):
    folder = write_folders(tmp_path / "set")
    (folder / "tables").mkdir()
    lines = [f"../{name}/Miller {i}.png,{name}" for name in ("cat", "dog") for i in range(NUM)]
    (folder / "tables" / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    config = config_of(folder, layout="table")
    store = made(tmp_path / "store", config)
    (folder / "cat" / "Miller 1.png").unlink()
    told = asked_json(capsys, "names", "--store", store.uri)
    found = {s["path"]: s["file"] for s in told["samples"] if s["path"]}
    assert found["../dog/Miller 2.png"] == str(folder / "dog/Miller 2.png")
    assert told["without_file"] == 1


def test_samples_of_arrays_and_phantoms_are_their_place(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    arrays = {f"{split}_images": images[4 * i : 4 * i + 4] for i, split in enumerate(("train", "val", "test"))}
    arrays |= {f"{split}_labels": np.array([[0], [1], [0], [1]]) for split in ("train", "val", "test")}
    np.savez(tmp_path / "set.npz", **arrays)
    store = made(tmp_path / "a", config_of(tmp_path / "set.npz", layout="npz", classes=("no", "yes")))
    told = asked_json(capsys, "names", "--store", store.uri)
    assert {s["file"] for s in told["samples"]} == {
        f"{tmp_path}/set.npz/{split}_images/{i}" for split in ("train", "val", "test") for i in range(4)
    }
    store = made(tmp_path / "b", DataConfig(phantoms=PhantomConfig(num_patients=12, images_per_patient=2, side=32)))
    told = asked_json(capsys, "names", "--store", store.uri)
    assert {(s["path"], s["frame"]) for s in told["samples"]} == {
        (f"patient{i:05d}", frame) for i in range(12) for frame in range(2)
    }


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["names", "fff0fff0"], "no sample of"),
        (["names", "pets", "Miller"], "is not a key prefix"),
        (["names", "dogs"], "pets/default"),
        (["names", "--out", "names.txt"], "give a .csv"),
        (["names", "--predictions", "mine", "pets"], "has no predictions"),
        (["duplicates", "--page", "page.txt"], "give a .html"),
        (["quarantine", "--out", "q.csv"], "add --names"),
    ],
    ids=["key", "word", "dataset", "ending", "predictions", "page", "names"],
)
def test_wrong_use_says_what_would_be_right(store, capsys, argv, told):
    assert told in asked(capsys, *argv, "--store", store.uri, code=2)


def test_a_word_that_is_a_dataset_and_may_be_a_key_is_refused(tmp_path, source, capsys):
    store = made(tmp_path / "store", config_of(source, dataset="beef"))
    assert "--keys beef" in asked(capsys, "names", "beef", "--store", store.uri, code=2)
    assert asked_json(capsys, "names", "beef/default", "--store", store.uri)["without_file"] == 0


def test_names_are_not_written_into_store_images_or_other_files(store, source, tmp_path, capsys):
    (tmp_path / "link").symlink_to(store.uri)
    other = tmp_path / "labels.csv"
    other.write_text("file,label\n")
    targets = {f"{store.uri}/n.csv": "is in the store", str(tmp_path / "link" / "n.csv"): "is in the store"}
    targets |= {str(source / "n.csv"): "among the images", str(other): "exists and was not written"}
    for target, told in targets.items():
        assert told in asked(capsys, "names", "--out", target, "--store", store.uri, code=2)
        assert told in asked(capsys, "quarantine", "--names", "--out", target, "--store", store.uri, code=2)
    page = store.uri + "/page.html"
    assert "is in the store" in asked(capsys, "duplicates", "--names", "--page", page, "--store", store.uri, code=2)
    assert other.read_text() == "file,label\n"


def test_nothing_that_the_verbs_find_enters_the_store(store, tmp_path, capsys):
    before = {key: store.get(key) for key in store.list()}
    for argv in (
        ["names"],
        ["quarantine", "--names"],
        ["duplicates", "--names", "--page", str(tmp_path / "page.html")],
    ):
        asked(capsys, *argv, "--store", store.uri)
    assert {key: store.get(key) for key in store.list()} == before
    assert not any(b"Miller" in data for data in before.values())


def test_predictions_name_misclassified_files_surest_first(tmp_path, source, config, capsys):
    store = made(tmp_path / "store", config)
    dataset = open_dataset(store.at("datasets/pets/default"))
    index = dataset.index("test")
    truth = index.labels.argmax(1).tolist()
    scores = [[0.9, 0.1] if label == 0 else [0.2, 0.8] for label in truth]
    wrong = [truth.index(0), truth.index(1)]
    scores[wrong[0]], scores[wrong[1]] = [0.4, 0.6], [0.7, 0.3]
    table = pa.table({"key": index.key.tolist(), "label": [[label] for label in truth], "scores": scores})
    pq.write_table(table, store.path("runs/mine/workflow.json").with_name("predictions.parquet"))
    record = {
        **{"facts": {"manifest": dataset.digest, "predictions": "runs/mine/predictions.parquet"}, "inputs": {}},
        **{"seconds": 1.0, "started": "", "finished": "", "placement": {}, "git_commit": "", "packages": {}},
    }
    store.put("runs/mine/evaluate/record.json", json.dumps(record).encode())
    told = asked_json(capsys, "names", "pets", "--predictions", "mine", "--store", store.uri)
    places = {key: path for key, path, _ in key_map(config)}
    assert [(s["path"], s["predicted"], s["correct"]) for s in told["samples"][:3]] == [
        (places[index.key[wrong[1]]], "cat", False),
        (places[index.key[wrong[0]]], "dog", False),
        (told["samples"][2]["path"], told["samples"][2]["label_names"][0], True),
    ]
    assert len(told["samples"]) == len(index)
    record["facts"]["manifest"] = "0" * 64
    store.put("runs/mine/evaluate/record.json", json.dumps(record).encode())
    assert "another dataset" in asked(capsys, "names", "pets", "--predictions", "mine", "--store", store.uri, code=2)


# --------------------------------------------------------------------------------------------- quarantine, duplicates


def test_quarantine_counts_the_reasons_and_names_the_files(store, capsys):
    told = asked_json(capsys, "quarantine", "--names", "--store", store.uri)
    assert (told["finished"], told["quarantined"], told["images"]) == (True, 1, 2 * NUM + 1)
    assert told["reasons"] == {"a text, not an image": 1}
    (sample,) = told["samples"]
    assert (sample["path"], sample["label_names"]) == ("dog/torn.png", ["dog"])
    assert sample["split"] in ("train", "val", "test")
    without = asked(capsys, "quarantine", "--store", store.uri)
    assert "torn.png" not in without
    assert f"1 of {2 * NUM + 1} images" in without


def test_undecodable_images_of_a_refused_conversion_are_named(tmp_path, capsys):
    folder = write_folders(tmp_path / "set")
    for i in range(8):
        (folder / "dog" / f"Miller {i}.png").write_bytes(b"torn")
    config = config_of(folder, salt="s")
    with pytest.raises(ValueError, match="and 6 more; `medmamba shards quarantine pets/default --names") as caught:
        made(tmp_path / "store", config)
    command = str(caught.value).partition("`medmamba shards ")[2].partition("`")[0].split()
    assert "--salt" in asked(capsys, *command, code=2)
    told = asked_json(capsys, *command, "--salt", "s")
    assert (told["finished"], told["quarantined"], told["images"]) == (False, 9, 2 * NUM + 3)
    assert {s["path"] for s in told["samples"]} == {"dog/torn.png", *(f"dog/Miller {i}.png" for i in range(8))}
    assert {tuple(s["label_names"]) for s in told["samples"]} == {("dog",)}
    shown = asked(capsys, *command, "--salt", "s")
    assert "has not finished" in shown
    assert shown.count(".png") == 9


def write_leaking(folder: Path) -> DataConfig:
    """A table whose train split has 30 copies of one test image, and one of another."""
    folder.mkdir()
    lines = ["file,label,split"]
    for i in range(18):
        write_image(folder / f"case {i}.png", i)
        lines.append(f"case {i}.png,{('cat', 'dog')[i % 2]},{('train', 'val', 'test')[i // 2 % 3]}")
    for i in range(31):
        write_image(folder / f"copy {i}.png", 4 if i < 30 else 5)
        lines.append(f"copy {i}.png,{'cat' if i < 30 else 'dog'},train")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return config_of(folder, layout="table", split_column="split")


def test_a_conversion_refused_for_duplicates_lists_all_files(tmp_path, capsys):
    config = write_leaking(tmp_path / "set")
    with pytest.raises(ValueError, match="`medmamba shards duplicates") as caught:
        made(tmp_path / "store", config)
    command = str(caught.value).partition("`medmamba shards ")[2].partition("`")[0].split()
    page = tmp_path / "page.html"
    shown = asked(capsys, *command, "--page", str(page))
    assert "2 of 2 groups" in shown
    assert "and 25 more images (--all)" in shown
    assert "case 4.png" in shown
    everything = asked(capsys, *command, "--all")
    assert {f"copy {i}.png" for i in range(31)} == {
        name for name in (f"copy {i}.png" for i in range(31)) if name in everything
    }
    assert "more" not in everything
    told = asked_json(capsys, *command)
    assert (told["finished"], told["groups"], told["more"]) == (False, 2, 0)
    assert [len(finding["copies"]) + finding["more"] for finding in told["findings"]] in ([31, 2], [2, 31])
    assert {c["path"] for f in told["findings"] for c in f["copies"]} >= {"case 4.png", "copy 0.png", "copy 30.png"}
    drawn = page.read_text()
    assert "case 4.png" in drawn
    assert "and 25 more images" in drawn
    assert drawn.count("data:image/png;base64,") == 8


def test_duplicate_counts_agree_in_terminal_json_and_page(tmp_path, capsys):
    config = write_leaking(tmp_path / "set")
    store = made(
        tmp_path / "store",
        config.model_copy(update={"duplicates": config.duplicates.model_copy(update={"across": "report"})}),
    )
    told = asked_json(capsys, "duplicates", "--store", store.uri)
    shown = asked(capsys, "duplicates", "--store", store.uri)
    drawn = store.get("datasets/pets/default/duplicates.html").decode()
    for what, count in told["counts"].items():
        assert f'<td>{what}</td><td class="number">{count:,}</td>' in drawn
        assert any(line.split("│")[-1].strip() == f"{count:,}" for line in shown.splitlines() if line.startswith(what))
    assert told["groups"] == 2
    assert "2 of 2 groups" in shown
    assert "2 groups of duplicates" in drawn
    assert "and 25 more images" in shown
    assert "and 25 more images" in drawn
    assert {name for f in told["findings"] for c in f["copies"] for name in c["label_names"]} == {"cat", "dog"}
    assert all(isinstance(label, int) for f in told["findings"] for c in f["copies"] for label in c["labels"])


def test_labels_of_an_earlier_releases_report_are_names(store, tmp_path, capsys):
    shutil.copytree(store.uri, tmp_path / "old")
    key = f"datasets/pets/default/{REPORT}"
    old, copy = json.loads(store.get(key)), open_store(str(tmp_path / "old"))
    for finding in old["findings"]:
        del finding["more"], finding["equal"]
        for each in finding["copies"]:
            del each["label_names"]
    copy.put(key, json.dumps(old).encode())
    assert "cat" in asked(capsys, "duplicates", "--store", copy.uri)
    told = asked_json(capsys, "duplicates", "--names", "--store", copy.uri)
    assert {tuple(c["label_names"]) for f in told["findings"] for c in f["copies"]} == {("cat",)}
    assert {c["path"] for f in told["findings"] for c in f["copies"]} == {
        "cat/Miller 3.png",
        "cat/again 0.png",
        "cat/again 1.png",
    }


def test_a_dataset_unfinished_otherwise_lists_no_duplicates(tmp_path, capsys):
    store = open_store(str(tmp_path))
    store.put("datasets/pets/default/config.json", b'{"dataset": "pets"}')
    assert "was not rejected because of duplicates" in asked(capsys, "duplicates", "--store", store.uri, code=2)
    assert "0 of 0 images" in asked(capsys, "quarantine", "--store", store.uri)
    for damaged in (b"torn", b"[]", b"{}", b'{"dataset": "other"}', b'{"seed": "no"}'):
        store.put("datasets/pets/default/config.json", damaged)
        assert "config.json does not hold" in asked(capsys, "quarantine", "--names", "--store", store.uri, code=1)
