"""Old words on the command line and in `override`: they work, and each gives one line."""

import json

import pytest

from data_shards.renamed import both_keys, stored_values
from pipelines.cli import main
from pipelines.console.arguments import UsageError
from pipelines.console.renamed import in_new_words
from pipelines.override import ConfigError, override
from pipelines.placement import Placement, PlacementConfig
from pipelines.recipes import recipe
from pipelines.steps.shard import logged

GOES, STAYS = "the old name goes away in the next release (0.2.0)", "the old name stays valid"
OLD = {
    "near": ("--data.leaks.near 3", "--data.duplicates.near 3", GOES),
    "across": ("--data.leaks.across drop", "--data.duplicates.across drop", GOES),
    "within": ("--data.leaks.within drop", "--data.duplicates.within drop", GOES),
    "labels": ("--data.leaks.labels drop", "--data.duplicates.labels drop", GOES),
    "datasets": ("--data.leaks.datasets off", "--data.duplicates.datasets off", GOES),
    "equals sign": ("--data.leaks.near=3", "--data.duplicates.near=3", GOES),
    "csv": ("--data.csv x.csv", "--data.table x.csv", GOES),
    "layout": ("--data.layout csv", "--data.layout table", STAYS),
    "layout, equals sign": ("--data.layout=csv", "--data.layout=table", STAYS),
    "identifying": ("--data.dicom.identifying set-aside", "--data.dicom.identifying quarantine", GOES),
    "trials": ("--placement.trials 1", "--placement.concurrent-trials 1", GOES),
}
"""What is typed, what it means, and what becomes of the old word."""


def dry_run(capsys, tmp_path, *options: str) -> tuple[dict, str]:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images/x.csv").write_text("file,label\n")
    words = ["run", "release", "--recipe", "quickstart", "--dry-run", "--json", "--store", str(tmp_path / "store")]
    assert main([*words, "--data.source", str(tmp_path / "images"), *options]) == 0
    told = capsys.readouterr()
    return json.loads(told.out), told.err


@pytest.mark.parametrize("name", OLD)
def test_an_old_option_means_the_new_one_and_gives_one_line(name, capsys, tmp_path):
    old, new, fate = OLD[name]
    found, told = dry_run(capsys, tmp_path, *old.split())
    expected, silent = dry_run(capsys, tmp_path, *new.split())
    assert found == expected
    assert told.splitlines() == [f"medmamba: {old} is now {new}: {fate}"]
    assert silent == ""


def test_each_old_word_is_told_once(capsys):
    old = "run --data.leaks.near 3 --data.leaks.near 3 --data.csv a.csv"
    new = "run --data.duplicates.near 3 --data.duplicates.near 3 --data.table a.csv"
    assert in_new_words(old.split()) == new.split()
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    "words",
    [
        "run direct",
        "run",
        "shards show --out x.png",
        "submit -- run --data.leaks.near 3",
        "run --data.window -600 1500",
    ],
)
def test_other_command_lines_stay_as_they_are(words, capsys):
    assert in_new_words(words.split()) == words.split()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--data.leaks.near 3 --data.duplicates.near 4", "--data.leaks.near 3 and --data.duplicates.near 4 are one"),
        ("--data.duplicates.near=4 --data.leaks.near=3", "--data.leaks.near=3 and --data.duplicates.near=4 are one"),
        ("--data.csv a --data.table b", "--data.csv a and --data.table b are one"),
        (
            "--placement.trials 2 --placement.concurrent-trials 1",
            "--placement.trials 2 and --placement.concurrent-trials 1 are one",
        ),
    ],
)
def test_old_and_new_option_with_different_values_is_wrong_use(options, told, capsys, tmp_path):
    words = ["run", "release", "--recipe", "quickstart", "--dry-run", "--store", str(tmp_path / "store")]
    assert main([*words, *options.split()]) == 2
    assert f"{told} setting under its old and its new name" in capsys.readouterr().err


def test_the_same_value_under_both_names_is_taken():
    with_both = ["run", "--data.leaks.near", "3", "--data.duplicates.near", "3"]
    assert in_new_words(with_both) == ["run", "--data.duplicates.near", "3", "--data.duplicates.near", "3"]
    with pytest.raises(UsageError):
        in_new_words([*with_both, "--data.leaks.near", "4"])


def test_help_names_new_settings_only(capsys):
    assert main(["run", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--data.duplicates.near" in told
    assert "--placement.concurrent-trials" in told
    assert not any(word in told for word in ("leaks", "--data.csv", "set-aside", "--placement.trials", "twins"))


OVERRIDES = {
    "leaf": (
        {"data.leaks.near": 3},
        {"data.duplicates.near": 3},
        "data.leaks.near = 3 is now data.duplicates.near = 3",
    ),
    "part": (
        {"data.leaks": {"near": 3}},
        {"data.duplicates": {"near": 3}},
        "data.leaks = {'near': 3} is now data.duplicates = {'near': 3}",
    ),
    "csv": ({"data.csv": "x.csv"}, {"data.table": "x.csv"}, "data.csv = 'x.csv' is now data.table = 'x.csv'"),
    "layout": ({"data.layout": "csv"}, {"data.layout": "table"}, "data.layout = 'csv' is now data.layout = 'table'"),
    "identifying": (
        {"data.dicom.identifying": "set-aside"},
        {"data.dicom.identifying": "quarantine"},
        "data.dicom.identifying = 'set-aside' is now data.dicom.identifying = 'quarantine'",
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_override_takes_old_words_and_logs_one_line_for_each(name, caplog):
    old, new, told = OVERRIDES[name]
    base = recipe("quickstart")
    assert override(base, old) == override(base, new)
    (line,) = caplog.messages
    assert line.startswith(f"{told}: the old name ")


def test_override_takes_old_words_of_a_part(caplog):
    assert override(recipe("bccd").data, {"leaks.near": 3}).duplicates.near == 3
    assert override(PlacementConfig(), {"trials": 2}).concurrent_trials == 2
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "leaks.near = 3 is now duplicates.near = 3",
        "trials = 2 is now concurrent_trials = 2",
    ]


@pytest.mark.parametrize(
    "changes",
    [{"data.leaks.near": 3, "data.duplicates.near": 4}, {"data.duplicates.near": 4, "data.leaks.near": 3}],
)
def test_override_refuses_both_names_with_different_values(changes):
    with pytest.raises(ConfigError, match=r"data\.leaks\.near = 3 and data\.duplicates\.near = 4 are one setting"):
        override(recipe("quickstart"), changes)


def test_placements_in_records_keep_the_old_word():
    old = {
        "workers": 1, "device": "cpu", "cpus_per_worker": 1.0, "zero_stage": 0, "scan": "auto", "trials": 3, "nodes": 1
    }  # fmt: skip
    placement = Placement.model_validate(old)
    assert placement.concurrent_trials == 3
    stored = stored_values(placement)
    assert stored["trials"] == 3
    assert "concurrent_trials" not in stored
    assert PlacementConfig.model_validate({"trials": 2}) == PlacementConfig(concurrent_trials=2)


def test_the_old_name_of_a_command_works_with_a_line(tmp_path, capsys):
    (tmp_path / "store").mkdir()
    assert main(["shards", "leaks", "--store", str(tmp_path / "store")]) == 2
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == f"medmamba: medmamba shards leaks is now medmamba shards duplicates: {GOES}"


def test_json_of_the_catalog_has_both_names(capsys):
    assert main(["datasets", "pad-ufes-20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["table"], told["csv"], told["layout"]) == ("metadata.csv", "metadata.csv", "table")


def test_json_of_a_dry_run_has_both_names(capsys, tmp_path):
    found, _ = dry_run(capsys, tmp_path, "--data.duplicates.near", "5", "--placement.concurrent-trials", "1")
    assert found["recipe"]["data"]["duplicates"] == found["recipe"]["data"]["leaks"]
    assert found["recipe"]["data"]["duplicates"]["near"] == 5
    assert (found["placement"]["concurrent_trials"], found["placement"]["trials"]) == (1, 1)


def test_output_has_the_new_key_after_the_old_one():
    output = {"path": "x", "bytes": 5, "leaks": {"near": 1}}
    assert list(both_keys(output).items()) == [
        ("path", "x"),
        ("bytes", 5),
        ("size_bytes", 5),
        ("leaks", {"near": 1}),
        ("duplicates", {"near": 1}),
    ]


def test_metrics_of_a_conversion_have_both_names():
    facts = {
        "num_images": 9, "num_shards": 1, "quarantine": 0, "bytes": 7, "samples": {"train": 9},
        "leaks": {"exact across splits": 2},
    }  # fmt: skip
    found = logged(facts)
    assert found["size_bytes"] == found["bytes"] == 7
    assert found["duplicates exact across splits"] == found["copies exact across splits"] == 2
