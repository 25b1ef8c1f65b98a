"""Turned and mirrored duplicates: found on request, treated as other duplicates are, and named in reports."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from tiny_sets import InMemorySet, coded

from data_shards.config import DataConfig
from data_shards.convert import convert, key_map
from data_shards.duplicates import DuplicatesError, read_report
from data_shards.duplicates.fingerprint import fingerprint, symmetric
from data_shards.duplicates.near import near_clusters, turned_clusters
from data_shards.duplicates.page import PAGE
from data_shards.manifest import open_dataset
from data_shards.source import Row
from data_shards.store import open_store

SYMMETRIES = [
    lambda image: image,
    np.fliplr,
    np.flipud,
    lambda image: np.rot90(image, 2),
    np.transpose,
    lambda image: np.rot90(image, 1),
    lambda image: np.rot90(image, 3),
    lambda image: np.fliplr(np.rot90(image, 1)),
]


def image(number: int, height: int = 60, width: int = 48) -> np.ndarray:
    """Gray, with structure at several scales, unlike any other number's."""
    small = np.random.default_rng(number).integers(0, 256, (12, 12), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, "JPEG", quality=90)
    return np.asarray(Image.open(data))


def bits_of(*images: np.ndarray) -> np.ndarray:
    rows = [Row(str(i), 0, (0,), None, None) for i in range(len(images))]
    held = {str(i): np.ascontiguousarray(pixels) for i, pixels in enumerate(images)}
    return fingerprint(InMemorySet(rows, held), rows).bits


def distance(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.bitwise_count(one ^ two).sum())


@pytest.mark.parametrize("number", range(3))
def test_fingerprints_of_turned_images_follow_from_the_images_own(number):
    own, *turned = bits_of(image(number), *(change(image(number)) for change in SYMMETRIES))
    eight = symmetric(own[None])[:, 0]
    assert (eight[0] == own).all()
    nearest = [min(range(8), key=lambda g: distance(eight[g], each)) for each in turned]
    assert sorted(nearest) == list(range(8))
    assert max(distance(eight[g], each) for g, each in zip(nearest, turned, strict=True)) <= 4


def test_each_turned_copy_joins_its_image_and_no_other():
    changed = [change(image(number)) for number, change in enumerate(SYMMETRIES)]
    bits = bits_of(*(image(number) for number in range(20)), *map(jpeg, changed))
    found = turned_clusters(bits, most=12)
    assert (found[20:] == found[:8]).all()
    assert len(set(found[:20].tolist())) == 20
    apart = near_clusters(bits, most=12)
    assert (apart[21:] != apart[1:8]).all()


def write_set(folder, copies):
    """Twelve images in three splits, and copies (file, number of the image, symmetry, split)."""
    folder.mkdir(parents=True)
    rows = [
        (f"{split}{i}.png", 10 * n + i, 0, "ab"[i % 2], split)
        for n, split in enumerate(("train", "val", "test"))
        for i in range(4)
    ]
    rows += [(file, number, g, "ab"[number % 2], split) for file, number, g, split in copies]
    for file, number, g, _, _ in rows:
        (folder / file).write_bytes(coded(np.ascontiguousarray(SYMMETRIES[g](image(number)))))
    lines = ["file,label,split", *(f"{file},{label},{split}" for file, _, _, label, split in rows)]
    (folder / "t.csv").write_text("\n".join(lines))
    return folder


def config_of(folder, dataset="mine", **duplicates) -> DataConfig:
    return DataConfig(
        dataset=dataset,
        layout="table",
        source=str(folder),
        split_column="split",
        duplicates={"symmetries": "exact", **duplicates},
    )


TURNED = [("turned.png", 20, 5, "train"), ("mirrored.png", 11, 1, "val")]  # of test0; of val1


def files_in(store, config, split):
    places = {key: where for key, where, _ in key_map(config)}
    return {places[key] for key in open_dataset(store).index(split).key.tolist()}


def test_turned_duplicates_are_refused_only_where_they_are_searched_for(tmp_path):
    folder = write_set(tmp_path / "set", TURNED)
    with pytest.raises(DuplicatesError, match=r"'test0.png' \(test, .* 'turned.png' \(train, .*: turned or mirrored"):
        convert(config_of(folder), open_store(str(tmp_path / "out")))
    plain = open_store(str(tmp_path / "plain"))
    convert(config_of(folder, symmetries="off"), plain)
    report = read_report(plain)
    assert (report.findings, report.symmetries) == ((), "off")
    assert not any(what.startswith("turned") for what in report.counts)


def test_they_are_a_kind_of_their_own_in_the_report(tmp_path):
    store = open_store(str(tmp_path / "out"))
    config = config_of(write_set(tmp_path / "set", TURNED), across="report")
    facts = convert(config, store)
    assert (facts["leaks"]["turned across splits"], facts["leaks"]["turned within a split"]) == (1, 1)
    assert (facts["leaks"]["near across splits"], facts["leaks"]["exact within a split"]) == (0, 0)
    report = read_report(store)
    assert [(each.kind, each.where) for each in report.findings] == [
        ("turned", "across splits"),
        ("turned", "within a split"),
    ]
    assert ". turned, " in store.get(PAGE).decode()


@pytest.mark.parametrize("across", ["drop", "move"])
def test_policies_hold_for_them_too(tmp_path, across):
    store = open_store(str(tmp_path / "out"))
    config = config_of(write_set(tmp_path / "set", TURNED), across=across)
    facts = convert(config, store)
    assert "turned.png" not in files_in(store, config, "train")
    assert ("turned.png" in files_in(store, config, "test")) == (across == "move")
    assert facts["dropped"] == (1 if across == "drop" else 0)


def test_they_are_found_in_other_datasets_of_the_store(tmp_path):
    first, second = (open_store(str(tmp_path / "datasets" / name / "default")) for name in ("one", "two"))
    convert(config_of(write_set(tmp_path / "a", []), "one"), first)
    folder = write_set(tmp_path / "b", [])
    for path in folder.glob("*.png"):
        path.write_bytes(coded(np.ascontiguousarray(np.asarray(Image.open(path))[:, ::-1])))
    convert(config_of(folder, "two"), second)
    report = read_report(second)
    assert report.counts["also in other datasets"] == 12
    assert {each.kind for each in report.findings} == {"turned"}


@pytest.mark.parametrize("symmetries", ["off", "exact"])
def test_every_report_says_what_was_not_searched_for(tmp_path, capsys, symmetries):
    from pipelines.cli import main

    store = open_store(str(tmp_path / "store" / "datasets" / "mine" / "default"))
    convert(config_of(write_set(tmp_path / "set", []), symmetries=symmetries), store)
    told = read_report(store).not_searched
    assert "not searched for" in told
    assert ("--data.duplicates.symmetries" in told) == (symmetries == "off")
    assert told in store.get(PAGE).decode()
    asked = ["shards", "duplicates", "mine", "--store", str(tmp_path / "store")]
    assert main(asked) == 0
    assert told in capsys.readouterr().out.replace("\n", " ")
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_searched"] == told
