"""`medmamba shards`: a finished dataset verified, drawn, and asked for copies."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store
from pipelines.cli import main


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    config = DataConfig(phantoms=PhantomConfig(num_patients=30, images_per_patient=2, side=32), samples_per_shard=20)
    convert(config, open_store(str(folder / "datasets" / "phantoms" / "default")))
    return str(folder)


def test_show_writes_a_contact_sheet_and_tells_the_counts(store, tmp_path, capsys):
    target = tmp_path / "sheet.png"
    assert main(["shards", "show", "phantoms", "--per-class", "4", "--out", str(target), "--store", store]) == 0
    with Image.open(target) as sheet:
        assert sheet.width > 4 * 96
    told = capsys.readouterr().out
    assert "smooth ellipse" in told
    assert f"wrote 12 images of {store}/datasets/phantoms/default to {target}" in told


def test_duplicates_tells_counts_and_where_the_pictures_are(store, capsys):
    assert main(["shards", "duplicates", "--store", store]) == 0
    told = capsys.readouterr().out
    assert "exact across splits" in told
    assert f"{store}/datasets/phantoms/default/duplicates.html" in told
    assert main(["shards", "duplicates", "phantoms/default", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 60


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["shards", "look"], "available: verify, show, duplicates"),
        (["shards", "show", "phantom"], "phantoms/default"),
        (["shards", "show", "--split", "trian"], "it has train, val, test"),
        (["shards", "show", "--per-class", "0"], "at least 1"),
        (["shards", "show", "--out", "sheet.gif"], "give a .png"),
    ],
    ids=["verb", "dataset", "split", "number", "ending"],
)
def test_wrong_use_says_what_there_is(store, capsys, argv, told):
    chosen = argv if argv[1] == "look" else [*argv, "--store", store]
    assert main(chosen) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")


def test_a_store_without_datasets_says_how_to_make_one(tmp_path, capsys):
    assert main(["shards", "verify", "--store", str(tmp_path)]) == 2
    assert "medmamba shard" in capsys.readouterr().err
