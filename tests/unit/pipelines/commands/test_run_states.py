"""What stands in a store: every run, where its steps stand, and one clause about each."""

import json
import os
from dataclasses import asdict, replace

import pytest
from finished_run import finish

from data_shards.store import open_store
from data_shards.store.claims import Claim
from data_shards.store.fenced_lease import TTL_S
from data_shards.store.holder import Holder
from pipelines.commands.run_states import read_status
from pipelines.placement import Placement
from pipelines.recipes import Recipe
from pipelines.steps.facts import TuneFacts
from pipelines.tracking.leases import driver_lease
from pipelines.tracking.promotions import Promotion
from pipelines.worker.checkpoint.stored import FILES, Checkpoints
from pipelines.worker.state import TrainState, describe


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("store"))
    finish(uri, "whole", Recipe())
    finish(uri, "half", Recipe(), workflow="direct", last="evaluate", failing=["train"])
    return open_store(uri)


def test_an_empty_store_has_no_runs(tmp_path):
    assert read_status(open_store(str(tmp_path / "nothing"))) == []


def test_a_foreign_file_among_the_promotions_is_not_one(tmp_path):
    store = open_store(str(tmp_path))
    store.put("promotions/Desktop.ini", b"")
    assert read_status(store) == []


def test_each_step_of_a_run_is_listed_as_finished_with_facts(store):
    rows = read_status(store, "whole")
    assert {row["state"] for row in rows} == {"done"}
    assert {row["step"]: row["told"] for row in rows} == {
        "shard": "12 images of 2 classes in 2 shards",
        "tune": "3 trials, winner trial t1",
        "train": "epoch 3, val AUC 0.9123",
        "evaluate": "test AUC 0.9000 over 120 images",
        "report": "runs/r/report/report.html",
        "register": "medmamba-phantoms version 7",
        "promote": "yes: there is no champion yet",
    }
    assert [row["finished"] for row in rows] == sorted(row["finished"] for row in rows)


def test_a_failed_step_is_last_with_its_reason(store):
    rows = read_status(store, "half")
    assert [(row["step"], row["state"], row["finished"] is None, row["told"]) for row in rows] == [
        ("shard", "done", False, "12 images of 2 classes in 2 shards"),
        ("train", "failed", True, "stopped by the test"),
    ]


def test_one_damaged_record_does_not_hide_the_other_steps(store, tmp_path):
    other = open_store(str(tmp_path))
    for key in store.list("runs/whole/"):
        other.put(key, store.get(key))
    record = json.loads(other.get("runs/whole/promote/record.json"))
    del record["facts"]["reason"]
    other.put("runs/whole/promote/record.json", json.dumps(record).encode())
    told = {row["step"]: row["told"] for row in read_status(other)}
    assert told["evaluate"] == "test AUC 0.9000 over 120 images"
    assert "the record of step promote is not valid (reason" in told["promote"]


def test_a_step_without_a_record_and_a_reason_was_interrupted(store, tmp_path):
    other = open_store(str(tmp_path))
    other.put("runs/r/train/config.json", store.get("runs/half/train/config.json"))
    assert [(row["state"], row["told"]) for row in read_status(other)] == [("interrupted", "")]


def test_a_held_step_is_running_with_its_newest_checkpoint(store, tmp_path):
    other = open_store(str(tmp_path))
    other.put("runs/r/train/config.json", store.get("runs/half/train/config.json"))
    state = TrainState(epoch=2, step=25, losses=[0.5] * 5)
    placement = Placement(
        workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="auto", concurrent_trials=1, nodes=1
    )
    described = describe(state, seed=0, placement=placement, manifest="m")
    (tmp_path / "file").write_bytes(b"x")
    Checkpoints(other.at("runs/r/train")).write(25, dict.fromkeys(FILES, tmp_path / "file"), described)
    told = "checkpoint after 2 epochs and 5 steps, 0 min ago"
    with driver_lease(other, "r", wait_s=0, say=print):
        assert [(row["state"], row["told"]) for row in read_status(other)] == [("running", told)]
    assert [(row["state"], row["told"]) for row in read_status(other)] == [("interrupted", told)]


def test_a_promotion_that_ended_elsewhere_is_interrupted(store, tmp_path):
    other, elsewhere = open_store(str(tmp_path)), Holder("otherhost", 4711, "another boot", 1)
    other.put("runs/r/promote/config.json", store.get("runs/whole/promote/config.json"))
    begun = Promotion(3, {"version": 7}, "/elsewhere/store/runs/r/promote", elsewhere)
    other.put("promotions/m/1700000000000/champion/00000003.json", json.dumps(asdict(begun)).encode())
    other.put("promotions/m/1700000000000/champion/00000001.json", b"damaged")
    lease = tmp_path / "leases/models/m/00000003.json"
    other.put("leases/models/m/00000003.json", json.dumps(asdict(Claim("t", elsewhere, "then", TTL_S))).encode())
    assert [(row["state"], row["told"]) for row in read_status(other)] == [("interrupted", "")]  # may be under way
    then = lease.stat().st_mtime - TTL_S - 60
    os.utime(lease, (then, then))
    told = "process 4711 on otherhost ended while moving the alias champion of m to version 7"
    ((state, said),) = [(row["state"], row["told"]) for row in read_status(other)]
    assert (state, said.partition(";")[0]) == ("interrupted", told)
    lease.rename(lease.with_name("00000004.json"))  # taken over
    assert read_status(other)[0]["told"].startswith(told)
    other.put(
        "promotions/m/1700000000000/champion/00000003.json", json.dumps(asdict(replace(begun, state="void"))).encode()
    )
    assert read_status(other)[0]["told"] == ""


def test_a_winner_has_its_number_where_the_record_knows_it():
    known = {"digest": "t", "winner": {}, "winner_trial": "2ad399ca", "trials": [{}, {}, {}, {}]}
    assert TuneFacts(**{**known, "winner_number": 3}).winner_name == "trial 3/4"
    assert TuneFacts(**known).winner_name == "trial 2ad399ca"


def test_all_runs_are_listed_and_a_name_is_not_a_prefix(store):
    assert {row["run"] for row in read_status(store)} == {"whole", "half"}
    assert read_status(store, "who") == []
