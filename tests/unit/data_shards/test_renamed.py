"""Old words of settings: accepted, kept in digests and in stored files, and never shown to users."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_shards.catalog import DatasetCard, card
from data_shards.config import DataConfig, DicomConfig, DuplicatesConfig
from data_shards.convert import convert
from data_shards.plan import config_digest
from data_shards.renamed import COMMANDS, OUTPUT, SETTINGS, both_words, new_words, old_words, renamed, stored_values
from data_shards.settings import settings_on_record
from data_shards.store import open_store

ROOT = Path(__file__).resolve().parents[3]
PAIRS = {
    "leaks": ({"leaks": {"near": 3, "across": "drop"}}, {"duplicates": {"near": 3, "across": "drop"}}),
    "csv": ({"csv": "labels.csv"}, {"table": "labels.csv"}),
    "layout": ({"layout": "csv"}, {"layout": "table"}),
    "identifying": ({"dicom": {"identifying": "set-aside"}}, {"dicom": {"identifying": "quarantine"}}),
    "identifying keep": ({"dicom": {"identifying": "keep"}}, {"dicom": {"identifying": "keep"}}),
}
"""Settings in old words and in new ones."""
PHANTOMS = {"dataset": "phantoms", "phantoms": {"num_patients": 12, "images_per_patient": 1, "side": 32}}


@pytest.mark.parametrize("name", PAIRS)
def test_old_and_new_words_are_one_configuration_with_one_digest(name):
    old, new = (DataConfig.model_validate(words) for words in PAIRS[name])
    assert old == new == DataConfig(**PAIRS[name][0]) == DataConfig().model_copy(update=dict(new))
    assert config_digest(old) == config_digest(new)
    assert old_words(PAIRS[name][1], "data") == PAIRS[name][0]
    assert new_words(PAIRS[name][0], "data") == PAIRS[name][1]


def test_stored_files_have_old_words_and_users_see_new_ones():
    config = DataConfig.model_validate(PAIRS["leaks"][1] | PAIRS["csv"][1] | PAIRS["layout"][1])
    shown, stored, identity = config.model_dump(mode="json"), stored_values(config), config.identity()
    assert (shown["duplicates"]["near"], shown["table"], shown["layout"]) == (3, "labels.csv", "table")
    assert (stored["leaks"]["near"], stored["csv"], stored["layout"]) == (3, "labels.csv", "csv")
    assert (identity["leaks"]["near"], identity["dicom"]["identifying"]) == (3, "set-aside")
    assert not {"duplicates", "table"} & (stored.keys() | identity.keys())
    assert DataConfig.model_validate(stored) == config


def test_parts_alone_take_old_words_too():
    assert DicomConfig.model_validate({"identifying": "set-aside"}) == DicomConfig()
    assert stored_values(DicomConfig())["identifying"] == "set-aside"
    leaks = DuplicatesConfig(near=5)
    assert DataConfig.model_validate({"leaks": leaks}).duplicates is leaks
    assert DataConfig().model_copy(update={"leaks": leaks, "csv": "a.csv"}) == DataConfig(
        duplicates=leaks, table="a.csv"
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"leaks": {"near": 3}, "duplicates": {"near": 4}}, r"data\.leaks\.near = 3 and data\.duplicates\.near = 4"),
        ({"duplicates": {"near": 4}, "leaks": {"near": 3}}, r"data\.leaks\.near = 3 and data\.duplicates\.near = 4"),
        ({"csv": "a.csv", "table": "b.csv"}, r"data\.csv = 'a\.csv' and data\.table = 'b\.csv'"),
        (
            {"leaks": DuplicatesConfig(near=3), "duplicates": {"near": 4}},
            r"data\.leaks\.near = 3 and data\.duplicates\.near = 4",
        ),
    ],
    ids=["nested", "the other order", "plain", "an object"],
)
def test_two_values_under_the_old_and_the_new_name_are_an_error(settings, told):
    with pytest.raises(ValidationError, match=f"{told} are one setting .*give only the new"):
        DataConfig.model_validate(settings)


def test_equal_values_under_both_names_are_one_setting():
    both = {"leaks": {"near": 3, "within": "drop"}, "duplicates": {"near": 3, "across": "drop"}}
    expected = {"duplicates": {"near": 3, "within": "drop", "across": "drop"}}
    assert DataConfig.model_validate(both) == DataConfig.model_validate(expected)
    assert DataConfig.model_validate(both_words(DataConfig(table="a").model_dump(), "data")) == DataConfig(table="a")


def test_a_card_may_have_old_words():
    known = card("pad-ufes-20")
    assert (known.layout, known.table) == ("table", "metadata.csv")
    old = old_words(known.model_dump(mode="json"), "data")
    assert (old["layout"], old["csv"]) == ("csv", "metadata.csv")
    assert list(old["files"]) == list(known.files)
    assert DatasetCard.model_validate(old) == known


def test_the_settings_of_a_dataset_keep_the_old_words(tmp_path, caplog):
    out = open_store(str(tmp_path / "datasets/phantoms/default"))
    config = DataConfig.model_validate(PHANTOMS | {"duplicates": {"near": 5}})
    convert(config, out)
    written = json.loads(out.get("config.json"))
    assert (written["leaks.near"], written["csv"], written["dicom.identifying"]) == (5, "", "set-aside")
    assert not [key for key in written if key.startswith(("duplicates", "table"))]
    assert settings_on_record(out) == (config, "")
    convert(DataConfig.model_validate(PHANTOMS | {"leaks": {"near": 5}}), out)
    assert caplog.text == ""


def test_drift_of_a_dataset_is_told_in_new_words(tmp_path):
    out = open_store(str(tmp_path / "datasets/phantoms/default"))
    convert(DataConfig.model_validate(PHANTOMS), out)
    other = PHANTOMS | {"leaks": {"near": 3}, "dicom": {"identifying": "keep"}, "csv": "x.csv"}
    with pytest.raises(ValueError, match="other settings") as refused:
        convert(DataConfig.model_validate(other), out)
    told = str(refused.value)
    assert "data.duplicates.near: 12 -> 3" in told
    assert "data.dicom.identifying: 'quarantine' -> 'keep'" in told
    assert "data.table: '' -> 'x.csv'" in told
    assert not re.search(r"leaks|csv:|set-aside", told)


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.old)
def test_every_new_word_of_the_table_is_a_setting(row):
    (old, _, old_value), (new, _, new_value) = (word.partition("=") for word in (row.old, row.new))
    assert old.rpartition(".")[0] == new.rpartition(".")[0]
    assert renamed(old, old_value or None) == (new, new_value or None)
    if old_value:
        assert old == new


def test_the_readme_lists_every_old_word():
    text = (ROOT / "pipelines/README.md").read_text().partition("### Renamed settings\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    listed = {(old.split("`")[1], new.strip("`"), since, goes) for old, new, since, goes in cells}
    rows = (*SETTINGS, *COMMANDS, *OUTPUT)
    assert listed == {(row.old, row.new, row.since, row.goes or "stays") for row in rows}
