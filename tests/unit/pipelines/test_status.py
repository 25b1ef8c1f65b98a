"""What stands in a store: every run, where its steps stand, and one clause about each."""

import pytest
from finished_run import finish

from data_shards.store import open_store
from pipelines.recipes import Recipe
from pipelines.status import read_status


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
        "tune": "3 trials, winner t1",
        "train": "epoch 3, val AUC 0.9123",
        "evaluate": "test AUC 0.9000 over 120 images",
        "register": "medmamba-phantoms version 7",
        "promote": "yes: there is no champion yet",
    }
    assert [row["finished"] for row in rows] == sorted(row["finished"] for row in rows)


def test_an_interrupted_step_stands_last_and_what_was_never_begun_not_at_all(store):
    rows = read_status(store, "half")
    assert [(row["step"], row["state"], row["finished"] is None) for row in rows] == [
        ("shard", "done", False),
        ("train", "interrupted", True),
    ]


def test_all_runs_are_listed_and_a_name_is_not_a_prefix(store):
    assert {row["run"] for row in read_status(store)} == {"whole", "half"}
    assert read_status(store, "who") == []
