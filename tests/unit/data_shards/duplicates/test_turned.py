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
from data_shards.duplicates.scan import FOLDER
from data_shards.duplicates.shifted import shifted_clusters
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


def moved(pixels: np.ndarray, degrees: float, across: float, down: float) -> np.ndarray:
    """Turned, then shifted by these shares of the sides; the edge is continued."""
    height, width = pixels.shape
    padded = Image.fromarray(np.pad(pixels, 20, mode="edge"))
    turned = padded.rotate(degrees, Image.Resampling.BICUBIC, translate=(across * width, down * height))
    return np.asarray(turned)[20 : 20 + height, 20 : 20 + width]


MOVES = [
    (degrees, across, down)
    for degrees in (-5, -3.7, 0, 1.3, 5)
    for across, down in ((0, 0), (0.05, 0.05), (-0.05, 0.03), (0.013, -0.05))
]


def thumbnails_of(*images: np.ndarray) -> np.ndarray:
    rows = [Row(str(i), 0, (0,), None, None) for i in range(len(images))]
    found = fingerprint(
        InMemorySet(rows, dict(zip(map(str, range(len(images))), images, strict=True))), rows, thumbnails=True
    )
    assert found.thumbnails is not None
    return found.thumbnails


def bits_of(*images: np.ndarray) -> np.ndarray:
    rows = [Row(str(i), 0, (0,), None, None) for i in range(len(images))]
    held = {str(i): np.ascontiguousarray(pixels) for i, pixels in enumerate(images)}
    return fingerprint(InMemorySet(rows, held), rows).bits


def distance(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.bitwise_count(one ^ two).sum())


@pytest.mark.parametrize("number", range(3))
def test_fingerprints_of_turned_images_follow_from_it(number):
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


def test_small_turns_and_shifts_join_their_image_and_no_other():
    images = [image(number, 60, 60) for number in range(len(MOVES) + 20)]
    copies = [moved(images[number], *move) for number, move in enumerate(MOVES)]
    found = shifted_clusters(thumbnails_of(*images, *copies))
    assert (found[len(images) :] == found[: len(MOVES)]).all()
    assert len(set(found.tolist())) == len(images)


def test_turns_and_shifts_beyond_the_range_are_other_images():
    one = image(1, 60, 60)
    others = [moved(one, 15, 0, 0), moved(one, 0, 0.15, 0), np.fliplr(one)]
    assert len(set(shifted_clusters(thumbnails_of(one, *others)).tolist())) == 4


@pytest.mark.parametrize("num", [0, 1, 2])
def test_a_few_images_are_enough(num):
    few = np.zeros((num, 32, 32), np.uint8) if not num else thumbnails_of(*(image(i) for i in range(num)))
    assert len(set(shifted_clusters(few).tolist())) == num


def write_set(folder, copies):
    """Twelve images in three splits, and copies (file, number of the image, symmetry or -1 for a shift, split)."""
    folder.mkdir(parents=True)
    rows = [
        (f"{split}{i}.png", 10 * n + i, 0, "ab"[i % 2], split)
        for n, split in enumerate(("train", "val", "test"))
        for i in range(4)
    ]
    rows += [(file, number, g, "ab"[number % 2], split) for file, number, g, split in copies]
    for file, number, g, _, _ in rows:
        pixels = SYMMETRIES[g](image(number)) if g >= 0 else moved(image(number), 3, -0.03, 0.04)
        (folder / file).write_bytes(coded(np.ascontiguousarray(pixels)))
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


def test_turned_duplicates_are_refused_only_on_request(tmp_path):
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


def test_shifted_ones_are_found_where_all_are_searched_for(tmp_path):
    copies = [*TURNED, ("shifted.png", 21, -1, "train")]  # of test1
    folder = write_set(tmp_path / "set", copies)
    stores = {name: open_store(str(tmp_path / name)) for name in ("exact", "all")}
    for name, store in stores.items():
        convert(config_of(folder, symmetries=name, across="report"), store)
    kinds = {name: sorted(each.kind for each in read_report(store).findings) for name, store in stores.items()}
    assert kinds == {"exact": ["turned", "turned"], "all": ["shifted", "turned", "turned"]}
    assert read_report(stores["all"]).counts["shifted across splits"] == 1
    with pytest.raises(DuplicatesError, match=r"'shifted.png' \(train, .* 'test1.png' \(test, .*: shifted"):
        convert(config_of(folder, symmetries="all"), open_store(str(tmp_path / "refused")))


def test_a_refused_conversion_keeps_its_thumbnails(tmp_path, monkeypatch):
    config = config_of(write_set(tmp_path / "set", TURNED), symmetries="exact")
    store = open_store(str(tmp_path / "out"))
    scanned = []

    def counting(run, tasks):
        scanned.append(sum(len(task.rows) for task in tasks))
        return map(run, tasks)

    for symmetries in ("exact", "all", "all"):
        duplicates = config.duplicates.model_copy(update={"symmetries": symmetries})
        with pytest.raises(DuplicatesError):
            convert(config.model_copy(update={"duplicates": duplicates}), store, run_tasks=counting)
    assert scanned == [14, 14, 0]  # the first kept no thumbnails
    assert len([key for key in store.list(FOLDER) if key.endswith(".npz")]) == 1


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


@pytest.mark.parametrize("symmetries", ["off", "exact", "all"])
def test_every_report_says_what_was_not_searched_for(tmp_path, capsys, symmetries):
    from pipelines.cli import main

    store = open_store(str(tmp_path / "store" / "datasets" / "mine" / "default"))
    convert(config_of(write_set(tmp_path / "set", []), symmetries=symmetries), store)
    told = read_report(store).not_searched
    assert "not searched for" in told
    assert ("--data.duplicates.symmetries" in told) == (symmetries != "all")
    assert told in store.get(PAGE).decode()
    asked = ["shards", "duplicates", "mine", "--store", str(tmp_path / "store")]
    assert main(asked) == 0
    assert told in capsys.readouterr().out.replace("\n", " ")
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_searched"] == told
