"""Copies of images across splits, groups, labels and datasets: found, told, and dealt with as the config says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sets import coded

from data_shards.config import DataConfig, DuplicatesConfig
from data_shards.convert import convert, key_map
from data_shards.duplicates import REPORT, DuplicatesError, DuplicatesReport, Finding, lost_text, read_report
from data_shards.duplicates.page import PAGE
from data_shards.duplicates.scan import FINGERPRINTS, FOLDER, REFUSED
from data_shards.manifest import MANIFEST, ManifestError, open_dataset
from data_shards.split import LeakError
from data_shards.store import open_store


def image(number: int, side: int = 48) -> np.ndarray:
    """Smooth structure, unlike any other number's."""
    small = np.random.default_rng(number).integers(0, 256, (10, 10), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def write_set(folder: Path, rows: list[tuple[str, int, str, str, str]], *, columns=("split", "group")) -> Path:
    """A CSV set; each row is (file, number of its image, label, split, group); a number below 0 is a near copy."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(["file", "label", *columns])]
    for name, number, label, split, group in rows:
        near = Image.fromarray(image(abs(number))).point(lambda value: min(255, value + 6))
        pixels = image(number) if number >= 0 else np.asarray(near)
        (folder / name).write_bytes(coded(pixels))
        chosen = {"split": split, "group": group}
        lines.append(",".join([name, label, *(chosen[column] for column in columns)]))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def distinct(first: int = 100) -> list[tuple[str, int, str, str, str]]:
    """Two classes in three splits, twelve images of twelve patients."""
    return [
        (f"{split}{i}.png", first + 10 * n + i, "ab"[i % 2], split, f"patient {split} {i}")
        for n, split in enumerate(("train", "val", "test"))
        for i in range(4)
    ]


def config_of(folder: Path, **changes) -> DataConfig:
    settings = {"dataset": "mine", "layout": "table", "source": str(folder), "group_column": "group"}
    return DataConfig(**{**settings, "split_column": "split", **changes})


COPIES = [
    ("copy in train.png", 120, "a", "train", "patient x"),  # of test0
    ("near copy in val.png", -121, "b", "val", "patient y"),  # of test1
]


def names_in(store, config: DataConfig) -> dict[str, list[str]]:
    places = {key: where for key, where, _ in key_map(config)}
    dataset = open_dataset(store)
    return {split: sorted(places[key] for key in dataset.index(split).key) for split in ("train", "val", "test")}


def test_a_set_without_copies_is_reported_as_such(tmp_path):
    store = open_store(str(tmp_path / "out"))
    facts = convert(config_of(write_set(tmp_path / "set", distinct())), store)
    report = read_report(store)
    assert (report.images, report.findings, report.dropped, facts["dropped"]) == (12, (), (), 0)
    assert set(report.counts.values()) == {0}
    assert "No image appears twice" in store.get(PAGE).decode()


def test_a_test_image_in_train_is_refused_before_any_shard(tmp_path):
    store = open_store(str(tmp_path / "out"))
    config = config_of(write_set(tmp_path / "set", [*distinct(), *COPIES]))
    with pytest.raises(LeakError, match=r"2 images have duplicates in different splits") as caught:
        convert(config, store)
    told = str(caught.value)
    assert "'copy in train.png' (train, label 'a') = 'test0.png' (test, label 'a'): equal pixels" in told
    assert "'near copy in val.png' (val, label 'b') = 'test1.png' (test, label 'b'): nearly equal" in told
    assert "--data.duplicates.across" in told
    assert [key for key in store.list() if key != "config.json" and not key.startswith(FOLDER)] == []


def test_near_0_looks_for_equal_pixels_only(tmp_path):
    config = config_of(write_set(tmp_path / "set", [*distinct(), COPIES[1]]), duplicates={"near": 0})
    assert convert(config, open_store(str(tmp_path / "out")))["leaks"]["near across splits"] == 0


def test_report_moves_no_image_and_lists_both_copies(tmp_path):
    store = open_store(str(tmp_path / "out"))
    config = config_of(write_set(tmp_path / "set", [*distinct(), *COPIES]), duplicates={"across": "report"})
    facts = convert(config, store)
    assert facts["num_images"] == 14
    assert facts["leaks"] == {
        **{"exact across splits": 1, "near across splits": 1, "exact within a split": 0, "near within a split": 0},
        **{"under different labels": 0, "also in other datasets": 0},
    }
    places = {key: where for key, where, _ in key_map(config)}
    found = {
        (finding.kind, *sorted((places[copy.key], copy.split, copy.fate) for copy in finding.copies))
        for finding in read_report(store).findings
    }
    assert found == {
        ("exact", ("copy in train.png", "train", "kept"), ("test0.png", "test", "kept")),
        ("near", ("near copy in val.png", "val", "kept"), ("test1.png", "test", "kept")),
    }


def test_drop_leaves_out_the_less_held_out_copies_and_lists_them(tmp_path):
    store = open_store(str(tmp_path / "out"))
    config = config_of(write_set(tmp_path / "set", [*distinct(), *COPIES]), duplicates={"across": "drop"})
    facts = convert(config, store)
    assert (facts["num_images"], facts["dropped"]) == (12, 2)
    assert names_in(store, config)["test"] == [f"test{i}.png" for i in range(4)]
    places = {key: where for key, where, _ in key_map(config)}
    assert sorted(places[key] for key in read_report(store).dropped) == ["copy in train.png", "near copy in val.png"]
    assert {c.fate for f in read_report(store).findings for c in f.copies if c.split != "test"} == {"dropped"}


def test_move_takes_a_copy_with_its_group_to_the_held_out_split(tmp_path):
    store = open_store(str(tmp_path / "out"))
    companion = ("companion.png", 500, "a", "train", "patient x")
    config = config_of(write_set(tmp_path / "set", [*distinct(), *COPIES, companion]), duplicates={"across": "move"})
    convert(config, store)
    found = names_in(store, config)
    assert {"copy in train.png", "companion.png", "near copy in val.png"} <= set(found["test"])
    assert len(found["train"]) == 4


def test_drawn_splits_keep_copies_of_patients_on_one_side(tmp_path):
    rows = [(f"{i}.png", 1000 + i, "ab"[i % 2], "", f"p{i}") for i in range(60)]
    rows += [(f"copy {i}.png", 1000 + i, "ab"[i % 2], "", f"q{i}") for i in range(0, 60, 3)]
    folder = write_set(tmp_path / "set", rows, columns=("group",))
    store = open_store(str(tmp_path / "out"))
    config = config_of(folder, split_column="", val_fraction=0.3, test_fraction=0.3)
    facts = convert(config, store)
    home = {name: split for split, names in names_in(store, config).items() for name in names}
    assert [i for i in range(0, 60, 3) if home[f"{i}.png"] != home[f"copy {i}.png"]] == []
    assert (facts["leaks"]["exact across splits"], facts["leaks"]["dealt out together"]) == (0, 20)
    assert len(set(home.values())) == 3
    # Drawn without a look at copies, as `report` has it, some would have been torn apart.
    blind = convert(
        config.model_copy(update={"duplicates": DuplicatesConfig(across="report")}), open_store(str(tmp_path / "b"))
    )
    assert blind["leaks"]["exact across splits"] > 0


def test_official_splits_of_the_catalog_are_reported_and_kept(tmp_path, shared_dir):
    config = DataConfig(dataset="pneumoniamnist", source=str(shared_dir / "data" / "pneumoniamnist.npz"))
    facts = convert(config, open_store(str(tmp_path / "out")))
    assert facts["num_images"] == 5856
    exact = facts["leaks"]["exact within a split"] + facts["leaks"]["exact across splits"]
    arrays = np.load(config.source)
    every = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
    assert exact == 5856 - len(np.unique(every.reshape(len(every), -1), axis=0)) > 0


@pytest.mark.parametrize(("policy", "kept"), [("report", 13), ("drop", 11)])
def test_equal_pixels_with_two_labels_are_reported_or_dropped(tmp_path, policy, kept):
    other_label = ("again.png", 100, "b", "train", "patient z")  # train0 is of class a
    config = config_of(write_set(tmp_path / "set", [*distinct(), other_label]), duplicates={"labels": policy})
    store = open_store(str(tmp_path / "out"))
    facts = convert(config, store)
    assert facts["num_images"] == kept
    assert facts["leaks"]["under different labels"] == 2
    assert [finding.conflict for finding in read_report(store).findings] == [True]
    assert "different labels" in store.get(PAGE).decode()


def test_equal_pixels_under_two_labels_may_be_refused(tmp_path):
    other_label = ("again.png", 100, "b", "train", "patient z")
    config = config_of(write_set(tmp_path / "set", [*distinct(), other_label]), duplicates={"labels": "refuse"})
    with pytest.raises(LeakError, match=r"1 image has duplicates with different labels.*--data\.duplicates\.labels"):
        convert(config, open_store(str(tmp_path / "out")))


def test_equal_pixels_twice_in_a_split_may_be_reduced_to_one(tmp_path):
    again = ("again.png", 100, "a", "train", "patient z")
    config = config_of(write_set(tmp_path / "set", [*distinct(), again]), duplicates={"within": "drop"})
    facts = convert(config, open_store(str(tmp_path / "out")))
    assert (facts["num_images"], facts["dropped"], facts["leaks"]["exact within a split"]) == (12, 1, 1)


def test_images_of_another_dataset_are_reported_or_refused(tmp_path):
    root = open_store(str(tmp_path / "store"))
    convert(config_of(write_set(tmp_path / "a", distinct())), root.at("datasets/mine/default"))
    shared = [*distinct(first=700)[:-1], ("from the other.png", 102, "b", "test", "patient w")]
    config = config_of(write_set(tmp_path / "b", shared), dataset="other")
    store = root.at("datasets/other/default")
    with pytest.raises(LeakError, match=r"1 images are also in the dataset 'mine/default'"):
        convert(config.model_copy(update={"duplicates": DuplicatesConfig(datasets="refuse")}), store)
    assert convert(config, store)["leaks"]["also in other datasets"] == 1
    (finding,) = read_report(store).findings
    assert [(copy.dataset, copy.split) for copy in finding.copies] == [("", "test"), ("mine/default", "train")]
    assert [copy.label_names for copy in finding.copies] == [("b",), ("a",)]
    with pytest.raises(LeakError, match=r"1 images are also in other datasets"):  # asked of a finished one
        convert(config.model_copy(update={"duplicates": DuplicatesConfig(datasets="refuse")}), store)
    # Another conversion of the same images is no leak.
    again = convert(config.model_copy(update={"name": "small", "max_side": 16}), root.at("datasets/other/small"))
    assert again["leaks"]["also in other datasets"] == 1


def test_a_dataset_found_in_two_others_counts_each_image_once(tmp_path):
    root = open_store(str(tmp_path / "store"))
    convert(config_of(write_set(tmp_path / "a", distinct())), root.at("datasets/first/default"))
    # 102 stands there twice: first a near copy in val, then itself in train.
    near_first = [("0 near.png", -102, "a", "val", "patient x"), *distinct()]
    lenient = DuplicatesConfig(across="report")
    convert(
        config_of(write_set(tmp_path / "b", near_first), dataset="second", duplicates=lenient),
        root.at("datasets/second/d"),
    )
    store = root.at("datasets/third/default")
    facts = convert(config_of(write_set(tmp_path / "c", distinct()), dataset="third", duplicates=lenient), store)
    assert facts["leaks"]["also in other datasets"] == 12
    report = read_report(store)
    assert [finding.kind for finding in report.findings] == ["exact"] * 24
    assert all(finding.copies[0].split == finding.copies[1].split for finding in report.findings)
    assert report.more == 0


def test_more_findings_than_are_told_are_counted(tmp_path, monkeypatch):
    for module in ("clusters", "guard"):
        monkeypatch.setattr(f"data_shards.duplicates.{module}.MOST_FINDINGS", 5)
    root = open_store(str(tmp_path / "store"))
    convert(config_of(write_set(tmp_path / "a", distinct())), root.at("datasets/mine/default"))
    rows = [*distinct(), *COPIES]
    config = config_of(write_set(tmp_path / "b", rows), dataset="other", duplicates=DuplicatesConfig(across="report"))
    store = root.at("datasets/other/default")
    assert convert(config, store)["leaks"]["also in other datasets"] == 14
    report = read_report(store)
    wheres = [finding.where for finding in report.findings]
    assert (wheres, report.more) == (["across splits"] * 2 + ["across datasets"] * 3, 11)


def test_a_partly_equal_group_is_near_and_counts_equal_images(tmp_path):
    rows = [*distinct(), ("equal.png", 120, "a", "test", "patient x"), ("near.png", -120, "a", "test", "patient y")]
    store = open_store(str(tmp_path / "out"))
    convert(config_of(write_set(tmp_path / "set", rows)), store)
    (finding,) = read_report(store).findings
    assert (finding.kind, finding.equal, finding.num_copies) == ("near", 2, 3)
    assert "1. near (2 with equal pixels)" in store.get(PAGE).decode()


def many_copies(num: int) -> list[tuple[str, int, str, str, str]]:
    """An image `num` times in train, under both labels, and at last once in test."""
    many = [(f"many {i:03d}.png", 900, "ab"[i == num - 1], "train", f"patient many {i}") for i in range(num)]
    return [*distinct(), *many, ("zz last.png", 900, "a", "test", "patient z")]


def test_all_copies_are_listed_with_split_or_label_changes_first(tmp_path):
    store = open_store(str(tmp_path / "out"))
    convert(
        config_of(write_set(tmp_path / "set", many_copies(60)), duplicates=DuplicatesConfig(across="report")), store
    )
    (finding,) = read_report(store).findings
    assert [(copy.split, copy.label_names) for copy in finding.copies[:3]] == [
        ("train", ("a",)),
        ("train", ("b",)),
        ("test", ("a",)),
    ]
    assert (len(finding.copies), finding.more, len({copy.key for copy in finding.copies})) == (61, 0, 61)
    assert "61 images" in store.get(PAGE).decode()
    assert "and 55 more images" in store.get(PAGE).decode()


def test_copies_beyond_the_room_of_a_long_report_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("data_shards.duplicates.clusters.MOST_COPIES", 4)
    monkeypatch.setattr("data_shards.duplicates.clusters.MOST_COPIES_IN_ALL", 10)
    store = open_store(str(tmp_path / "out"))
    convert(
        config_of(write_set(tmp_path / "set", many_copies(20)), duplicates=DuplicatesConfig(across="report")), store
    )
    (finding,) = read_report(store).findings
    assert (len(finding.copies), finding.more, finding.num_copies) == (10, 11, 21)


@pytest.mark.parametrize(
    ("leaks", "told"),
    [
        (
            {"across": "drop"},
            r"'b' is gone from train: of the 1 images that 'b' had there, 1 dropped.*duplicates\.across report",
        ),
        ({"across": "move"}, r"'b' is gone from train: .* 1 moved to another split .*duplicates\.across report"),
        ({"labels": "drop"}, r"'b' is gone from train: .* 1 dropped .*--data\.duplicates\.labels report"),
    ],
    ids=["dropped across splits", "moved", "dropped for its labels"],
)
def test_a_class_lost_to_duplicates_is_named_with_the_reason(tmp_path, leaks, told):
    rows = [row for row in distinct() if row[3] != "train" or row[2] == "a"]
    copy = ("only b.png", 100, "b", "train", "p") if "labels" in leaks else ("only b.png", 121, "b", "train", "p")
    config = config_of(write_set(tmp_path / "set", [*rows, copy]), duplicates={"across": "report", **leaks})
    with pytest.raises(DuplicatesError, match=told):
        convert(config, open_store(str(tmp_path / "out")))


def test_classes_that_are_gone_are_named_with_their_splits():
    lost = [("test", 1), ("train", 1), ("val", 1), ("val", 0)]
    assert lost_text(lost, ("a", "b")) == "class 'b' is gone from train, val and test, class 'a' is gone from val"
    assert lost_text([("val", i) for i in range(9)], ()).endswith(
        "'class 4' is gone from val, 4 more classes are gone from some split"
    )


def test_a_refusal_leaves_the_report_and_the_command_to_print_it(tmp_path):
    store = open_store(str(tmp_path / "a store/datasets/mine/default"))
    folder = write_set(tmp_path / "set", [*distinct(), *COPIES])
    with pytest.raises(
        DuplicatesError, match=r"`medmamba shards duplicates mine/default --names --store '.*/a store'`"
    ):
        convert(config_of(folder), store)
    report = read_report(store, REFUSED)
    assert (report.across, len(report.findings), report.more, report.dropped) == ("refuse", 2, 0, ())
    assert b"copy in train" not in store.get(REFUSED)
    convert(config_of(folder, duplicates={"across": "drop"}), store)
    assert store.head(REFUSED) is None


def test_a_report_of_an_earlier_release_is_read(tmp_path):
    store = open_store(str(tmp_path / "out"))
    convert(config_of(write_set(tmp_path / "set", [*distinct(), *COPIES]), duplicates={"across": "report"}), store)
    old = json.loads(store.get(REPORT))
    for finding in old["findings"]:
        del finding["more"], finding["equal"]
        for copy in finding["copies"]:
            del copy["label_names"]
    store.put(REPORT, json.dumps(old).encode())
    report = read_report(store)
    assert [finding.head for finding in report.findings] == ["exact", "near"]
    assert [copy.label_names for copy in report.findings[0].copies] == [(), ()]


def test_an_earlier_releases_finding_claims_nothing_it_lacked():
    copy = {"key": "0" * 20, "split": "train", "labels": [0]}

    def finding(num: int, **counted) -> Finding:
        facts = {"kind": "exact", "where": "within a split", "conflict": False, "copies": [copy] * num, **counted}
        return Finding.model_validate(facts)

    assert [finding(num).head for num in (2, 3)] == ["exact", "exact or near"]
    assert [finding(num).rest(6) for num in (6, 9)] == ["", "and 3 more images"]
    assert finding(50).rest(6) == "and 44 or more images: the release that made the report listed 50"
    assert finding(50, equal=50, more=4).rest(50) == "and 4 more images"


def test_damaged_fingerprints_elsewhere_are_named_with_a_remedy(tmp_path):
    root = open_store(str(tmp_path / "store"))
    convert(config_of(write_set(tmp_path / "a", distinct())), root.at("datasets/mine/default"))
    root.at("datasets/mine/default").put(FINGERPRINTS, b"torn")
    config = config_of(write_set(tmp_path / "b", distinct(700)), dataset="other")
    with pytest.raises(
        ManifestError, match=r"datasets/mine/default has no complete fingerprints.* under another --run"
    ):
        convert(config, root.at("datasets/other/default"))


def test_the_page_shows_copies_and_no_private_name(tmp_path):
    store = open_store(str(tmp_path / "out"))
    convert(config_of(write_set(tmp_path / "set", [*distinct(), *COPIES]), duplicates={"across": "report"}), store)
    page = store.get(PAGE).decode()
    assert page.count("data:image/png;base64,") == 4
    assert "copy in train" not in page + store.get(REPORT).decode()


def test_the_report_depends_on_neither_task_count_nor_order(tmp_path):
    config = config_of(write_set(tmp_path / "set", [*distinct(), *COPIES]), duplicates={"across": "report"})
    one, two = open_store(str(tmp_path / "one")), open_store(str(tmp_path / "two"))
    convert(config, one)
    convert(config, two, run_tasks=lambda run, tasks: [run(task) for task in tasks[::-1]])
    assert one.get(REPORT) == two.get(REPORT)
    assert one.get(MANIFEST) == two.get(MANIFEST)


def test_a_lost_report_says_how_to_make_it_again(tmp_path):
    store = open_store(str(tmp_path / "out"))
    convert(config_of(write_set(tmp_path / "set", distinct())), store)
    report = json.loads(store.get(REPORT))
    assert DuplicatesReport.model_validate(report).images == 12
    store.put(REPORT, b"{}")
    with pytest.raises(ManifestError, match=r"no complete leakage\.json.* under another --run"):
        read_report(store)


def official(folder: Path, copies: dict[str, int]) -> DataConfig:
    """Folders of 24 images in train and 8 in test, and of copies of some of them: {path: number of the image}."""
    images = {
        f"{split}/{'ab'[i % 2]}/{i}.png": first + i
        for split, first, num in (("Training", 0, 24), ("Testing", 100, 8))
        for i in range(num)
    }
    for where, number in {**images, **copies}.items():
        (folder / where).parent.mkdir(parents=True, exist_ok=True)
        (folder / where).write_bytes(coded(image(number)))
    return DataConfig(dataset="mine", layout="folders", source=str(folder), val_fraction=0.3)


def test_val_drawn_from_official_train_keeps_copies_together(tmp_path):
    copies = {f"Training/a/copy {i}.png": i for i in range(0, 24, 2)}
    config, store = official(tmp_path / "set", copies), open_store(str(tmp_path / "out"))
    facts = convert(config, store)  # were they torn apart, the set would be refused for it
    assert facts["samples"]["test"] == 8
    found = {name: split for split, names in names_in(store, config).items() for name in names}
    assert all(found[f"Training/a/{i}.png"] == found[f"Training/a/copy {i}.png"] for i in range(0, 24, 2))
    assert "val" in found.values()


@pytest.mark.parametrize(("policy", "num"), [("drop", 32), ("move", 33), ("report", 33)])
def test_the_remedy_for_copies_across_official_folders_works(tmp_path, policy, num):
    config = official(tmp_path / "set", {"Testing/a/copy.png": 4})
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(LeakError, match=r"--data\.duplicates\.across drop, move or report"):
        convert(config, store)
    lenient = config.model_copy(update={"duplicates": DuplicatesConfig(across=policy)})
    assert convert(lenient, store)["num_images"] == num


def test_a_patient_in_official_train_and_test_is_refused(tmp_path):
    rows = [
        (f"{split}{i}.png", first + i, "ab"[i % 2], split, f"{split} {i}")
        for split, first in (("train", 0), ("test", 300))
        for i in range(8)
    ]
    rows += [("x.png", 900, "a", "train", "p"), ("y.png", 900, "a", "train", "q"), ("z.png", 901, "a", "test", "q")]
    with pytest.raises(LeakError, match="group 'q' is in the splits"):
        convert(config_of(write_set(tmp_path / "set", rows)), open_store(str(tmp_path / "out")))
