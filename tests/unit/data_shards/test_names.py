"""Keys found again in every kind of source, also in one that has changed or is read differently since."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import coded, pixels

from data_shards.config import DataConfig, DuplicatesConfig
from data_shards.convert import convert, key_map
from data_shards.duplicates import read_report
from data_shards.manifest import open_dataset
from data_shards.names import Sample, find, quarantined, samples
from data_shards.settings import settings_on_record
from data_shards.store import Store, open_store


def known(out: Store) -> dict[str, Sample]:
    return {sample.key: sample for sample in samples(open_dataset(out), read_report(out))}


def write_dicom_folders(folder: Path) -> DataConfig:
    """Two classes of six files of three frames each, of a patient each, and four pictures in a class."""
    dicom_files = pytest.importorskip("dicom_files", exc_type=ImportError)
    for c, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            frames = np.stack([pixels(100 * c + 10 * i + frame, 16, 16) for frame in range(3)])
            data = dicom_files.dicom_file(frames, NumberOfFrames=3, PatientID=f"{name} {i}", StudyInstanceUID=None)
            (folder / name / f"scan {i}").write_bytes(data)
        for i in range(4):
            (folder / name / f"picture {i}.png").write_bytes(coded(pixels(900 + 10 * c + i, 16, 16)))
    return DataConfig(dataset="own", layout="folders", source=str(folder))


def test_frames_of_dicom_files_are_found_by_file_and_frame(tmp_path):
    config, out = write_dicom_folders(tmp_path / "set"), open_store(str(tmp_path / "datasets/own/default"))
    convert(config, out)
    places = find(config, set(known(out)))
    assert {(key, place.path, place.frame) for key, place in places.of.items()} == set(key_map(config))
    assert {place.frame for place in places.of.values()} == {0, 1, 2}
    assert places.unlisted == 0


def test_files_and_frames_are_found_by_the_ends_of_their_paths(tmp_path):
    config, out = write_dicom_folders(tmp_path / "set"), open_store(str(tmp_path / "datasets/own/default"))
    convert(config, out)
    expected = set(key_map(config))
    Path(config.source, "a third class").mkdir()
    (tmp_path / "moved").mkdir()
    shutil.move(config.source, tmp_path / "moved/deeper")
    changed = config.model_copy(update={"source": str(tmp_path / "moved"), "classes": ("cat", "dog")})
    places = find(changed, set(known(out)))
    assert places.unlisted is None
    assert "a third class" in places.notes[0]
    assert {(key, place.path, place.frame) for key, place in places.of.items()} == expected
    assert {place.file for place in places.of.values()} == {
        str(path) for path in (tmp_path / "moved/deeper").rglob("*") if path.is_file()
    }


def write_folders(folder: Path, num: int = 12) -> DataConfig:
    for c, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            (folder / name / f"{i}.png").write_bytes(coded(pixels(100 * c + i)))
    return DataConfig(dataset="own", layout="folders", source=str(folder), duplicates=DuplicatesConfig(near=0))


def test_a_path_that_two_files_end_in_is_not_guessed(tmp_path):
    config, out = write_folders(tmp_path / "set"), open_store(str(tmp_path / "datasets/own/default"))
    convert(config, out)
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "set", tmp_path / "both" / name)
    Path(tmp_path / "both/two/cat/0.png").unlink()
    both = config.model_copy(update={"source": str(tmp_path / "both"), "classes": ("cat", "dog")})
    assert [place.file for place in find(both, set(known(out))).of.values()] == [f"{tmp_path}/both/one/cat/0.png"]


def test_objects_below_a_prefix_are_found_by_their_address(tmp_path, s3):
    config, out = write_folders(tmp_path / "set"), open_store(str(tmp_path / "datasets/own/default"))
    remote = open_store(f"{s3}/set")
    for path in Path(config.source).rglob("*.png"):
        remote.put(path.relative_to(config.source).as_posix(), path)
    config = config.model_copy(update={"source": remote.uri})
    convert(config, out)
    places = find(config, set(known(out)))
    assert {place.file for place in places.of.values()} == {f"{remote.uri}/{key}" for key in remote.list()}
    assert len(places.of) == 24


def test_recorded_settings_are_the_conversions_without_the_salt(tmp_path):
    config = write_folders(tmp_path / "set").model_copy(
        update={
            "salt": "pepper",
            "duplicates": DuplicatesConfig(near=3, labels="drop"),
            "max_side": 16,
            "classes": ("cat", "dog"),
        }
    )
    out = open_store(str(tmp_path / "datasets/own/default"))
    convert(config, out)
    found, digest = settings_on_record(out)
    assert found == config.model_copy(update={"salt": ""})
    assert len(digest) == 12


def test_a_later_releases_setting_does_not_hide_names(tmp_path):
    config, out = write_folders(tmp_path / "set"), open_store(str(tmp_path / "datasets/own/default"))
    convert(config, out)
    settings = out.get("config.json").replace(b'"seed"', b'"unheard_of": 1, "some.part": 2, "dicom.new": 3, "seed"')
    out.put("config.json", settings)
    assert settings_on_record(out)[0] == config


def test_quarantined_images_have_their_split_and_labels(tmp_path):
    config = write_folders(tmp_path / "set").model_copy(update={"max_quarantine": 0.1})
    Path(config.source, "dog/3.png").write_bytes(b"torn")
    out = open_store(str(tmp_path / "datasets/own/default"))
    convert(config, out)
    (sample,) = quarantined(open_dataset(out))
    assert (sample.labels, sample.state, sample.split in ("train", "val", "test")) == (("dog",), "quarantined", True)


def test_no_image_is_read(tmp_path):
    config, out = write_folders(tmp_path / "set"), open_store(str(tmp_path / "datasets/own/default"))
    convert(config, out)
    for path in Path(config.source).rglob("*.png"):
        path.write_bytes(b"")
    assert len(find(config, set(known(out))).of) == 24
