"""Versions of datasets that earlier code made: the same images and settings must keep giving the same digests.

Settings are written as users write them. A digest may change only together with the number of the conversion's rules
(`data_shards.rules`) or of the defaults, and with a note for users who have datasets. Renaming a module, a function or
a setting is not a reason: only the imports below may then change, and an old word keeps its meaning.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from fixed_sets import write_dicom, write_sets
from PIL import Image

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.loader.draws import uniforms
from data_shards.loader.order import even_quotas, mixed, shuffled
from data_shards.plan import config_digest
from data_shards.renamed import new_words
from data_shards.settings import settings_on_record
from data_shards.store import open_store

DIGITS = 16
# A manifest's own digest depends on them too: pyarrow writes its version into the index, Pillow codes arrays as PNG.
CODERS = {"pyarrow": "25.0.1", "pillow": "13.0.0"}


@dataclass(frozen=True)
class Case:
    """Settings, the digest of what they give (`contents`), and that of manifest.json, with the libraries in CODERS."""

    settings: dict[str, Any]
    images: Literal["kept", "coded", "computed"]
    """kept: shards hold the bytes of the files. coded: the conversion codes pixels as PNG. computed: pixels come from
    floating point, and another processor may round one differently."""
    contents: str
    manifest: str


CASES: dict[str, Case] = {
    "folders": Case(
        {"layout": "folders", "source": "flat"},
        "kept",
        "419dcfd09b50f689",
        "f6b28531e2743a5e",
    ),
    "folders, groups from names, other fractions and seed": Case(
        {
            "layout": "folders",
            "source": "flat",
            "group_pattern": "p(\\d+)_",
            "val_fraction": 0.25,
            "test_fraction": 0.3,
            "seed": 7,
        },
        "kept",
        "4fc4817eee94067c",
        "7676d521dc2df636",
    ),
    "folders, a salt and small shards": Case(
        {"layout": "folders", "source": "flat", "salt": "pepper", "samples_per_shard": 7},
        "kept",
        "6a5b3a11649254bb",
        "7accccc4c05cf8ba",
    ),
    "folders, shards of so many bytes": Case(
        {"layout": "folders", "source": "flat", "shard_bytes": 30000},
        "kept",
        "6f275d84aa663347",
        "edcf6fe8f2719260",
    ),
    "folders, shrunk": Case(
        {"layout": "folders", "source": "flat", "max_side": 16},
        "coded",
        "e8e1913d97f8fda9",
        "50072a3e05a88b6d",
    ),
    "folders, a class dropped": Case(
        {"layout": "folders", "source": "flat", "drop_classes": ["c"]},
        "kept",
        "2c801fcb19230ce8",
        "2891f5f88863529c",
    ),
    "folders, classes renamed into one": Case(
        {"layout": "folders", "source": "flat", "class_map": ["b=rest", "c=rest"]},
        "kept",
        "aa962076b9bf6e0f",
        "e8c364059998965f",
    ),
    "folders, classes in another order": Case(
        {"layout": "folders", "source": "flat", "classes": ["c", "a", "b"], "task": "ordinal"},
        "kept",
        "31ac33454436f614",
        "c043259f8714cd70",
    ),
    "folders, a damaged image": Case(
        {"layout": "folders", "source": "broken", "max_quarantine": 0.5},
        "kept",
        "82665a52f27d7242",
        "d66865b7bddc2211",
    ),
    "folders in a zip": Case(
        {"layout": "folders", "source": "flat.zip"},
        "kept",
        "419dcfd09b50f689",
        "f6b28531e2743a5e",
    ),
    "folders in a zip in a zip": Case(
        {"layout": "folders", "source": "nested.zip"},
        "kept",
        "419dcfd09b50f689",
        "f6b28531e2743a5e",
    ),
    "folders in a tar": Case(
        {"layout": "folders", "source": "flat.tar"},
        "kept",
        "419dcfd09b50f689",
        "f6b28531e2743a5e",
    ),
    "split folders around classes": Case(
        {"layout": "folders", "source": "tree"},
        "kept",
        "fb8b62d33f13e0da",
        "1be0bdc87ea291b1",
    ),
    "split folders around classes, ignored": Case(
        {"layout": "folders", "source": "tree", "split_folders": "ignore"},
        "kept",
        "f99f22f7c78885d4",
        "b6255da25224e3ac",
    ),
    "split folders inside classes": Case(
        {"layout": "folders", "source": "inside"},
        "kept",
        "9057f60d995b752b",
        "a1705b2ae0fcb12b",
    ),
    "split folders of other names": Case(
        {
            "layout": "folders",
            "source": "around",
            "split_values": ["TRAIN_ALL=train", "checks=val", "TEST_SIMPLE=test", "masks=drop"],
        },
        "kept",
        "6dc46cc00772c140",
        "a82d7f24b4f6cb85",
    ),
    "duplicates reported": Case(
        {"layout": "folders", "source": "copies", "leaks": {"across": "report"}},
        "kept",
        "312fdfbb3afdf25a",
        "234421c23e872a73",
    ),
    "duplicates across splits dropped": Case(
        {"layout": "folders", "source": "copies", "leaks": {"across": "drop"}},
        "kept",
        "e13cf36ccd6b170f",
        "cd97683979081965",
    ),
    "duplicates across splits moved": Case(
        {"layout": "folders", "source": "copies", "leaks": {"across": "move"}},
        "kept",
        "26c01f8b65c3624d",
        "333cb8847659250c",
    ),
    "duplicates within a split dropped": Case(
        {"layout": "folders", "source": "copies", "leaks": {"across": "report", "within": "drop"}},
        "kept",
        "41c8133cd6d9f5dd",
        "3048fac1c2e1fc7f",
    ),
    "duplicates under two labels dropped": Case(
        {"layout": "folders", "source": "copies", "leaks": {"across": "report", "labels": "drop"}},
        "kept",
        "1663b7371be34b61",
        "00654729b221e1ff",
    ),
    "only equal pixels are duplicates": Case(
        {"layout": "folders", "source": "copies", "leaks": {"across": "drop", "near": 0, "datasets": "off"}},
        "kept",
        "ad1e06ed7b2dca90",
        "7d71e16be297bbfb",
    ),
    "csv": Case(
        {"layout": "csv", "source": "table", "csv": "labels.csv", "label_column": "diagnosis"},
        "kept",
        "6860ea9e5059d5c7",
        "4df2ed343264e848",
    ),
    "csv, groups": Case(
        {
            "layout": "csv",
            "source": "table",
            "csv": "labels.csv",
            "label_column": "diagnosis",
            "group_column": "patient",
            "image_column": "file",
        },
        "kept",
        "b768f6d6eebd7c56",
        "0acd3f3d7784ff46",
    ),
    "csv, official splits": Case(
        {
            "layout": "csv",
            "source": "table",
            "csv": "labels.csv",
            "label_column": "diagnosis",
            "split_column": "fold",
            "split_values": ["1=train", "2=val", "0=test"],
        },
        "kept",
        "4106ee7bfd2086c9",
        "8c0435082aa91d95",
    ),
    "csv, train and test": Case(
        {
            "layout": "csv",
            "source": "table",
            "csv": "labels.csv",
            "label_column": "diagnosis",
            "split_column": "fold",
            "split_values": ["1=train", "2=train", "0=test"],
            "group_column": "patient",
        },
        "kept",
        "6459c918e8aa65a8",
        "5d254c2791e148e7",
    ),
    "csv, several labels": Case(
        {
            "layout": "csv",
            "source": "table",
            "csv": "labels.csv",
            "label_column": "marks",
            "task": "multilabel",
            "label_separator": ";",
            "no_finding": "clear",
        },
        "kept",
        "f3c406fee907fbe0",
        "e0c8a0ac9975874c",
    ),
    "csv, several labels, one dropped": Case(
        {
            "layout": "csv",
            "source": "table",
            "csv": "labels.csv",
            "label_column": "marks",
            "task": "multilabel",
            "label_separator": ";",
            "no_finding": "clear",
            "drop_classes": ["large"],
        },
        "kept",
        "2e54a183286e5cbe",
        "73416777c13b449e",
    ),
    "csv, rows without their file": Case(
        {
            "layout": "csv",
            "source": "table",
            "csv": "longer.csv",
            "label_column": "diagnosis",
            "rows_without_file": "drop",
        },
        "kept",
        "cf07a566385f0242",
        "04e81bfa1cbf8cac",
    ),
    "tsv": Case(
        {"layout": "csv", "source": "table", "csv": "labels.tsv", "label_column": "diagnosis", "seed": 3},
        "kept",
        "bfec6e503148ddd1",
        "1e2465fdb0428a7f",
    ),
    "xlsx": Case(
        {
            "layout": "csv",
            "source": "table",
            "csv": "labels.xlsx",
            "label_column": "diagnosis",
            "group_column": "patient",
        },
        "kept",
        "548aa70c0022f391",
        "0d14770edee25c88",
    ),
    "csv in a zip": Case(
        {
            "layout": "csv",
            "source": "table.zip",
            "csv": "set/labels.csv",
            "label_column": "diagnosis",
            "class_map": ["low=lower"],
        },
        "kept",
        "4232a8b219146b23",
        "562fa44d6e2e74be",
    ),
    "npz": Case(
        {"layout": "npz", "source": "grey.npz"},
        "coded",
        "110852166fe49fe8",
        "c636b9a3750ff045",
    ),
    "npz, color and one-hot": Case(
        {"layout": "npz", "source": "color.npz", "classes": ["v", "w", "x", "y", "z"], "task": "ordinal"},
        "coded",
        "547b39d806573cde",
        "0bae2de0ba6bf74b",
    ),
    "npz, several labels": Case(
        {"layout": "npz", "source": "marked.npz", "task": "multilabel", "classes": ["one", "two", "three"]},
        "coded",
        "0221d23b5c7949e1",
        "2e87b5f367563e1a",
    ),
    "npz, validation drawn": Case(
        {"layout": "npz", "source": "halves.npz", "val_fraction": 0.3, "max_side": 20},
        "coded",
        "8af859b8b047149d",
        "b77a12ca2defe90c",
    ),
    "dicom": Case(
        {"layout": "folders", "source": "dicom", "max_quarantine": 0.2},
        "coded",
        "ec6c739bbacb5ec9",
        "001c52ba119b7d9f",
    ),
    "dicom, shown in other ways": Case(
        {
            "layout": "folders",
            "source": "dicom",
            "dicom": {"frames": "first", "window": [1500, 1000], "identifying": "keep"},
        },
        "coded",
        "4e13407c98aa1ddc",
        "7ce80e3c5881ee68",
    ),
    "dicom in a table": Case(
        {
            "layout": "csv",
            "source": "dicom",
            "csv": "list.csv",
            "dicom": {"identifying": "keep", "objects": "keep", "view": 0},
        },
        "coded",
        "c917382afe37d671",
        "21a5ae879facc4ea",
    ),
    "breastmnist": Case(
        {"dataset": "breastmnist", "source": "grey.npz"},
        "coded",
        "8da834c895507cf6",
        "bc5625a0f9236fec",
    ),
    "retinamnist": Case(
        {"dataset": "retinamnist", "source": "color.npz", "name": "other"},
        "coded",
        "86918e85142bd6a9",
        "729afbbb46dfdee6",
    ),
    "kvasir": Case(
        {"dataset": "kvasir", "source": "kvasir"},
        "kept",
        "dad13dd71ed06b8e",
        "649ea4bac961fc2f",
    ),
    "fetal-planes-db": Case(
        {"dataset": "fetal-planes-db", "source": "planes"},
        "kept",
        "0077f24350257710",
        "a47a0c269f98232f",
    ),
    "fetal-planes-db, splits drawn": Case(
        {"dataset": "fetal-planes-db", "source": "planes", "split_column": "-"},
        "kept",
        "8abe3c368803a657",
        "a04762558d901dad",
    ),
    "pad-ufes-20": Case(
        {"dataset": "pad-ufes-20", "source": "skin"},
        "kept",
        "58faf0b39ffbb4a9",
        "d4cb49e17370a02d",
    ),
    "phantoms": Case(
        {"dataset": "phantoms", "phantoms": {"num_patients": 24, "images_per_patient": 2, "side": 32}},
        "computed",
        "ed3e67984c403285",
        "",
    ),
    "phantoms, other ones": Case(
        {
            "dataset": "phantoms",
            "layout": "phantoms",
            "seed": 5,
            "phantoms": {
                "num_patients": 18,
                "images_per_patient": 3,
                "side": 40,
                "speckle": 0.7,
                "contrast": [0.3, 0.6],
            },
        },
        "computed",
        "ea400d81a6f5e342",
        "",
    ),
}


# Digest of the settings in a manifest, for each field (and choice of a field) that decides bytes.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "ef1424cb5c9d0ebc"),
    "dataset": ({"dataset": "bccd"}, "da69d5919844619b"),
    "layout npz": ({"layout": "npz"}, "6681d9d8b9a0d7e1"),
    "layout folders": ({"layout": "folders"}, "27c895ff9b3a8a7e"),
    "layout csv": ({"layout": "csv"}, "f3491411e782eee7"),
    "layout phantoms": ({"layout": "phantoms"}, "a43ceee6ec7497c7"),
    "classes": ({"classes": ["b", "a"]}, "77b90a699bc66f43"),
    "drop_classes": ({"drop_classes": ["", "x"]}, "c6ba18344a35adca"),
    "class_map": ({"class_map": ["bkl=benign", "nv=benign"]}, "b0218d679e85ef44"),
    "task multiclass": ({"task": "multiclass"}, "9703eca5c3e0902e"),
    "task ordinal": ({"task": "ordinal"}, "f35761397ea573de"),
    "task multilabel": ({"task": "multilabel"}, "f75132140448dd8e"),
    "csv": ({"csv": "tables/labels.csv"}, "c1458147afeaa555"),
    "image_column": ({"image_column": "path"}, "f3fce2d2d3cde601"),
    "label_column": ({"label_column": "dx"}, "c78ef85209b93f52"),
    "label_separator": ({"label_separator": ";"}, "e879a83afed103a9"),
    "no_finding": ({"no_finding": "No Finding"}, "6b957fd47957bbc3"),
    "group_column": ({"group_column": "patient"}, "2405fa184bd3f45a"),
    "group_pattern": ({"group_pattern": "patient_(\\d+)_"}, "46a4976bba5996b4"),
    "split_column": ({"split_column": "fold"}, "a1a5441f9cefed43"),
    "no split_column": ({"split_column": "-"}, "3b1ff5760c53224a"),
    "split_values": ({"split_values": ["1=train", "=test", "masks=drop"]}, "97e6f43713c59ae9"),
    "split_folders": ({"split_folders": "ignore"}, "af4475f59bee976a"),
    "metadata_columns": ({"metadata_columns": ["age", "sex"]}, "143a0f5c5db6495f"),
    "rows_without_file": ({"rows_without_file": "drop"}, "f8008c0726e1574f"),
    "val_fraction": ({"val_fraction": 0.1}, "f9875fdb2cf641bd"),
    "test_fraction": ({"test_fraction": 0.25}, "7fbbd75fb29f09de"),
    "seed": ({"seed": 11}, "5a246e9e68bac0ab"),
    "salt": ({"salt": "pepper"}, "71953c447727866c"),
    "max_side": ({"max_side": 224}, "a604fcd6ebf53806"),
    "samples_per_shard": ({"samples_per_shard": 500}, "5c1b63cff95708df"),
    "shard_bytes": ({"shard_bytes": 1000000}, "ccfb7099a8205f1b"),
    "leaks.near": ({"leaks": {"near": 0}}, "833b268ead23e4bb"),
    "leaks.symmetries": ({"leaks": {"symmetries": "exact"}}, "21a1bb02cc6b9b7c"),
    "leaks.across report": ({"leaks": {"across": "report"}}, "6bea3ea351131d3c"),
    "leaks.across drop": ({"leaks": {"across": "drop"}}, "fc106601a080df37"),
    "leaks.across move": ({"leaks": {"across": "move"}}, "e35e463e58ffb6a2"),
    "leaks.across refuse": ({"leaks": {"across": "refuse"}}, "0dec600bf175090c"),
    "leaks.within": ({"leaks": {"within": "drop"}}, "a24ae565fa6f3d5a"),
    "leaks.labels drop": ({"leaks": {"labels": "drop"}}, "848c63949f82ce90"),
    "leaks.labels refuse": ({"leaks": {"labels": "refuse"}}, "e9f281cea3313ef4"),
    "dicom.frames": ({"dicom": {"frames": "first"}}, "34ba47f136c69116"),
    "dicom.window": ({"dicom": {"window": [-600, 1500]}}, "1a891a1451f85f75"),
    "dicom.view": ({"dicom": {"view": 1}}, "f233cde3778d6ad3"),
    "dicom.identifying": ({"dicom": {"identifying": "keep"}}, "4e776da53635d088"),
    "dicom.objects": ({"dicom": {"objects": "keep"}}, "60cac0979c1bdfa4"),
    "phantoms.num_patients": ({"phantoms": {"num_patients": 30}}, "1b295b4367e687ff"),
    "phantoms.images_per_patient": ({"phantoms": {"images_per_patient": 2}}, "4c248b2d505862d8"),
    "phantoms.side": ({"phantoms": {"side": 32}}, "c22c664c3be2f7c8"),
    "phantoms.speckle": ({"phantoms": {"speckle": 0.5}}, "4d3f8e96a3b26c6b"),
    "phantoms.contrast": ({"phantoms": {"contrast": [0.4, 0.6]}}, "281a59360ff4bf25"),
}
IN_NO_BYTE = [{"name": "x"}, {"source": "/y"}, {"max_quarantine": 0.5}, {"leaks": {"datasets": "off"}}]

# Settings, and the settings file that earlier code wrote for their dataset.
OLD = {
    "layout": "csv", "source": "table", "csv": "labels.csv", "image_column": "file", "label_column": "diagnosis",
    "group_column": "patient", "class_map": ["low=lower"], "drop_classes": ["high"], "task": "ordinal",
    "salt": "pepper", "classes": ["lower", "mid"], "val_fraction": 0.2, "test_fraction": 0.25, "seed": 4,
    "max_side": 30, "samples_per_shard": 9, "leaks": {"near": 8, "across": "move", "within": "drop", "labels": "drop"},
    "dicom": {"frames": "first", "window": [-600, 1500], "view": 1, "identifying": "keep", "objects": "keep"},
}  # fmt: skip
OLD_SETTINGS: dict[str, Any] = {
    "dataset": "stays",
    "name": "default",
    "source": "SOURCE",
    "layout": "csv",
    "classes": ["lower", "mid"],
    "drop_classes": ["high"],
    "class_map": ["low=lower"],
    "task": "ordinal",
    "csv": "labels.csv",
    "image_column": "file",
    "label_column": "diagnosis",
    "label_separator": "|",
    "no_finding": "",
    "group_column": "patient",
    "group_pattern": "",
    "split_column": "",
    "split_values": [],
    "split_folders": "keep",
    "rows_without_file": "refuse",
    "val_fraction": 0.2,
    "test_fraction": 0.25,
    "seed": 4,
    "salt": "825d5b890d95",
    "max_side": 30,
    "max_quarantine": 0.01,
    "samples_per_shard": 9,
    "shard_bytes": 256000000,
    "leaks.near": 8,
    "leaks.across": "move",
    "leaks.within": "drop",
    "leaks.labels": "drop",
    "leaks.datasets": "report",
    "dicom.frames": "first",
    "dicom.window": [-600.0, 1500.0],
    "dicom.view": 1,
    "dicom.identifying": "keep",
    "dicom.objects": "keep",
    "phantoms.num_patients": 300,
    "phantoms.images_per_patient": 4,
    "phantoms.side": 64,
    "phantoms.speckle": 0.3,
    "phantoms.contrast": [0.5, 0.85],
    "rules": 3,
    "splits_from": "",
}
NOT_COMPARED = ("name", "source", "max_quarantine", "leaks.datasets", "rules", "splits_from")  # they decide no byte
# An unfinished conversion: the digests by which it finds its shards and its fingerprints again.
OLD_PHANTOMS = {
    "dataset": "phantoms",
    "salt": "x",
    "phantoms": {"num_patients": 24, "images_per_patient": 2, "side": 32},
}
OLD_PLANS = {"train-00000": "8423766ce10bf53f"}
OLD_IDS = "021fb951f186c7f5"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """The folder of all image sets."""
    root = tmp_path_factory.mktemp("sets")
    write_sets(root)
    if util.find_spec("pydicom"):
        write_dicom(root)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """Arrays are unpacked here, not in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(settings: dict[str, Any], sets: Path, out: Path) -> Path:
    """Converts the set into a dataset of its own; its folder."""
    full = {"dataset": "stays", **settings}
    if "source" in full:
        full["source"] = str(sets / full["source"])
    folder = out / "datasets" / full["dataset"] / full.get("name", "default")
    convert(DataConfig.model_validate(full), open_store(str(folder)))
    return folder


def contents(folder: Path, images: str) -> str:
    """A digest of everything that our code decides, without what the version of a library decides."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["index"]
    table = pq.read_table(folder / "samples.parquet").to_pydict()
    if images != "kept":
        manifest["shards"] = [[shard["name"], shard["count"]] for shard in manifest["shards"]]
        del table["offset"], table["size"]
    if images == "computed":
        del manifest["mean"], manifest["std"]
    members = [
        _member(name, data, images)
        for path in sorted((folder / "shards").glob("*.tar"))
        for name, data in _members(path)
    ]
    return _digest([manifest, table, members])


def _members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def _member(name: str, data: bytes, images: str) -> list[str]:
    if images != "kept" and name.endswith((".png", ".jpg")):
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        data = repr(pixels.shape).encode() + (pixels.tobytes() if images == "coded" else b"")
    return [name, hashlib.sha256(data).hexdigest()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]


def same_coders() -> bool:
    return all(metadata.version(name) == version for name, version in CODERS.items())


@pytest.mark.parametrize("name", CASES)
def test_a_set_converted_again_is_the_same_version(name, sets, tmp_path):
    case = CASES[name]
    if "dicom" in case.settings.get("source", ""):
        pytest.importorskip("pydicom")
    folder = made(case.settings, sets, tmp_path)
    found = contents(folder, case.images)
    version = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:DIGITS]
    if not case.manifest or not same_coders():
        version = case.manifest
    assert (found, version) == (case.contents, case.manifest)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_digest_of_a_setting_stays(name):
    settings, digest = SETTINGS[name]
    assert config_digest(DataConfig.model_validate(settings))[:DIGITS] == digest


@pytest.mark.parametrize("name", [name for name, (old, _) in SETTINGS.items() if new_words(old, "data") != old])
def test_new_words_have_the_digest_of_the_old_ones(name):
    settings, digest = SETTINGS[name]
    assert config_digest(DataConfig.model_validate(new_words(settings, "data")))[:DIGITS] == digest


def test_every_setting_that_decides_bytes_is_among_them():
    plain = _flat(DataConfig().model_dump())
    others = [_flat(DataConfig.model_validate(settings).model_dump()) for settings, _ in SETTINGS.values()]
    never = [key for key, value in plain.items() if all(other[key] == value for other in others)]
    assert len(never) == len(IN_NO_BYTE)


@pytest.mark.parametrize("settings", IN_NO_BYTE, ids=lambda settings: next(iter(settings)))
def test_what_decides_no_byte_moves_no_digest(settings):
    assert config_digest(DataConfig.model_validate(settings))[:DIGITS] == SETTINGS["none"][1]


def test_a_dataset_with_earlier_settings_files_is_found(sets, tmp_path):
    folder = made(OLD, sets, tmp_path)
    old = {**OLD_SETTINGS, "source": str(sets / "table")}
    (folder / "config.json").write_text(json.dumps(old))
    before = (folder / "manifest.json").read_bytes()
    made(OLD, sets, tmp_path)  # drift would raise
    assert (folder / "manifest.json").read_bytes() == before
    config, salt = settings_on_record(open_store(str(folder)))
    full = DataConfig.model_validate({**OLD, "dataset": "stays", "source": str(sets / "table")})
    assert (config, salt) == (full.model_copy(update={"salt": ""}), OLD_SETTINGS["salt"])


@pytest.mark.parametrize("key", [key for key in OLD_SETTINGS if key not in NOT_COMPARED])
def test_another_value_in_that_file_is_drift(key, sets, old_dataset):
    folder, out = old_dataset
    other = {**OLD_SETTINGS, "source": str(sets / "table"), key: ["another"]}
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"other settings \(data\.\S+: \['another'\] -> "):
        made(OLD, sets, out)


@pytest.fixture(scope="module")
def old_dataset(sets, tmp_path_factory) -> tuple[Path, Path]:
    """The finished dataset of OLD, and the folder to convert it into."""
    out = tmp_path_factory.mktemp("old")
    return made(OLD, sets, out), out


def test_what_an_unfinished_conversion_left_is_known_again(tmp_path):
    class KilledError(Exception):
        pass

    def one_task(task, items):
        """Runs tasks like `map`, and is killed after the first."""
        for item in items[:1]:
            yield task(item)
        if len(items) > 1:
            raise KilledError

    config, folder = DataConfig.model_validate(OLD_PHANTOMS), tmp_path / "datasets" / "phantoms" / "default"
    with pytest.raises(KilledError):
        convert(config, open_store(str(folder)), run_tasks=one_task)
    (kept,) = (folder / "scan").glob("*.npz")
    with np.load(kept) as columns:
        ids = hashlib.sha256(columns["ids"].tobytes()).hexdigest()[:DIGITS]
    with pytest.raises(KilledError):
        convert(config, open_store(str(folder)), run_tasks=one_task)
    plans = {path.stem: json.loads(path.read_text())["plan"][:DIGITS] for path in (folder / "parts").glob("*.json")}
    assert (ids, plans) == (OLD_IDS, OLD_PLANS)


@pytest.mark.parametrize(
    ("draw", "digest"),
    [
        (lambda: shuffled(200, 3, 5), "3a1c79d95cf28b59"),
        (lambda: mixed([np.arange(0, 20), np.arange(20, 90)], even_quotas(90, [1, 1]), 3, 5), "42a6acb7fb8c86db"),
        (lambda: (uniforms(3, 5, np.arange(40), 6, purpose=2) * 2**53).astype(np.int64), "9c318c71a5f2d455"),
    ],
    ids=["order", "balanced order", "draws of augmentation"],
)
def test_a_resumed_training_draws_what_it_would_have_drawn(draw, digest):
    assert hashlib.sha256(np.ascontiguousarray(draw(), "<i8").tobytes()).hexdigest()[:DIGITS] == digest


def test_phantoms_are_drawn_as_before(tmp_path):
    folder = made(CASES["phantoms"].settings, tmp_path, tmp_path)
    table = pq.read_table(folder / "samples.parquet").to_pydict()
    first = min(table["key"])
    data = next(
        data for path in (folder / "shards").glob("*.tar") for name, data in _members(path) if name == f"{first}.png"
    )
    blocks = np.asarray(Image.open(io.BytesIO(data))).reshape(4, 8, 4, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(
        blocks,
        [
            [151.8, 128.3, 104.3, 131.2],
            [117.6, 94.1, 78.0, 126.4],
            [107.6, 109.8, 93.0, 108.9],
            [96.3, 108.2, 96.6, 92.5],
        ],
        atol=0.5,
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
