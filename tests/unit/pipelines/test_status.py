"""What stands in a store: every run, where its steps stand, and one clause about each."""

import pytest
from finished_run import finish

from data_shards.store import open_store
from pipelines.recipes import Recipe
from pipelines.status import read_status, winner_name


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("store"))
    finish(uri, "whole", Recipe())
    finish(uri, "half", Recipe(), workflow="direct", last="evaluate", failing=["train"])
    return open_store(uri)


def test_an_empty_store_has_no_runs(tmp_path):
    assert read_status(open_store(str(tmp_path / "nothing"))) == []


def test_each_step_of_a_run_stands_in_the_order_it_finished_with_its_facts(store):
    rows = read_status(store, "whole")
    assert {row["state"] for row in rows} == {"done"}
    assert {row["step"]: row["told"] for row in rows} == {
        "shard": "12 images of 2 classes in 2 shards",
        "tune": "3 trials, winner trial t1",
        "train": "epoch 3, val AUC 0.9123",
        "evaluate": "test AUC 0.9000 over 120 images",
        "register": "medmamba-phantoms version 7",
        "promote": "yes: there is no champion yet",
    }
    assert [row["finished"] for row in rows] == sorted(row["finished"] for row in rows)


def test_a_failed_step_is_last_with_its_reason_and_what_was_never_begun_is_not_listed(store):
    rows = read_status(store, "half")
    assert [(row["step"], row["state"], row["finished"] is None, row["told"]) for row in rows] == [
        ("shard", "done", False, "12 images of 2 classes in 2 shards"),
        ("train", "failed", True, "stopped by the test"),
    ]


def test_a_step_without_a_record_and_a_reason_was_interrupted(store, tmp_path):
    other = open_store(str(tmp_path))
    other.put("runs/r/train/config.json", store.get("runs/half/train/config.json"))
    assert [(row["state"], row["told"]) for row in read_status(other)] == [("interrupted", "")]


def test_a_winner_has_its_number_where_the_record_knows_it():
    trials = [{}, {}, {}, {}]
    assert winner_name({"winner_trial": "2ad399ca", "winner_number": 3, "trials": trials}) == "trial 3/4"
    assert winner_name({"winner_trial": "2ad399ca", "trials": trials}) == "trial 2ad399ca"


def test_all_runs_are_listed_and_a_name_is_not_a_prefix(store):
    assert {row["run"] for row in read_status(store)} == {"whole", "half"}
    assert read_status(store, "who") == []
