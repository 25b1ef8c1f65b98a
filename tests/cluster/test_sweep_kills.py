"""A sweep whose driver is killed again and again: it ends as the uninterrupted one, on a real Ray Tune."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_shards.store import Store, open_store

SWEEP = Path(__file__).parent / "cheap_sweep.py"
SIZES = ["8", "8", "1", "0.2"]  # trials, epochs, at once, seconds an epoch
KILLS = [(2, signal.SIGKILL), (9, signal.SIGKILL), (11, signal.SIGINT), (16, signal.SIGKILL), (24, signal.SIGTERM)]
"""After so many epochs of all trials together, this signal."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return finish(f"{folder}/sweep", folder)


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path) -> str:
    """Where the sweep's state is kept."""
    return f"{request.getfixturevalue('s3')}/sweep" if request.param == "s3" else f"{tmp_path}/sweep"


def start(uri: str, folder: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(SWEEP.parents[2])}
    command = [sys.executable, str(SWEEP), uri, *SIZES]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(uri: str, folder: Path) -> list[dict]:
    """The records of the sweep once it has ended."""
    process = start(uri, folder)
    told, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(told.splitlines()[-1])


def epochs_recorded(out: Store) -> int:
    keys = [key for key in out.list("trials/") if key.count("/") == 1]
    return sum(len(json.loads(out.get(key))["epochs"]) for key in keys)


def plain(records: list[dict]) -> list[dict]:
    """The records without the ids, which are drawn again for each sweep."""
    return [{name: value for name, value in record.items() if name != "id"} for record in records]


@pytest.mark.slow  # six drivers, one after another
def test_a_repeatedly_killed_sweep_ends_as_an_undisturbed_one(uninterrupted, place, tmp_path):
    out = open_store(place)
    for epochs, sent in KILLS:
        process = start(place, tmp_path)
        deadline = time.monotonic() + 100
        while epochs_recorded(out) < epochs:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        process.communicate(timeout=60)

    records = finish(place, tmp_path)
    assert plain(records) == plain(uninterrupted)
    assert {record["state"] for record in records} == {"ended", "stopped"}
    for record in records:
        made = json.loads(out.get(f"trials/{record['id']}/made"))
        assert made == list(range(1, len(record["epochs"]) + 1))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    trials = [run.data.tags["medmamba.trial"] for run in runs if "medmamba.trial" in run.data.tags]
    assert sorted(trials) == sorted(record["id"] for record in records)


@pytest.mark.slow
def test_a_diverged_trial_is_over_and_a_killed_one_is_retried(uninterrupted, tmp_path):
    for wrong in ("diverge-2-1", "crash-3-1"):
        (tmp_path / wrong).touch()
    first = finish(f"{tmp_path}/sweep", tmp_path)
    assert {record["number"]: record["state"] for record in first[1:3]} == {2: "diverged", 3: "failed"}
    assert [record["reason"].partition(" (")[0] for record in first[1:3]] == [
        "the loss is nan in epoch 1", "a trial was killed or crashed",
    ]  # fmt: skip
    for wrong in tmp_path.glob("*-1"):
        wrong.unlink()
    second = finish(f"{tmp_path}/sweep", tmp_path)
    assert second[1] == first[1]
    assert (second[2]["id"], second[2]["overrides"]) == (first[2]["id"], first[2]["overrides"])
    assert (second[2]["state"] in ("ended", "stopped"), second[2]["reason"]) == (True, "")
    assert [record for record in second if record["number"] != 3] == [r for r in first if r["number"] != 3]


def test_a_driver_that_lost_its_run_ends_and_writes_nothing_more(tmp_path):
    out = open_store(f"{tmp_path}/sweep")
    process = start(out.uri, tmp_path)
    deadline = time.monotonic() + 100
    while epochs_recorded(out) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "lost").touch()
    time.sleep(0.1)  # what was being written
    before = {key: out.get(key) for key in out.list("trials/") if key.endswith(".json")}
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert errors.splitlines()[-1].endswith("LostLeaseError: another driver has taken the run")
    assert {key: out.get(key) for key in out.list("trials/") if key.endswith(".json")} == before
