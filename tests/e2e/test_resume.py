"""SIGKILL of the driver in the middle of training; the same command then ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from chain import TINY, command, environment, medmamba
from mlflow import MlflowClient

DIRECT = ["run", "direct", *TINY, "--train.epochs", "6", "--json", "--run", "night"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The facts of a run that nobody disturbed. It also runs without any compiler on the machine."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "path"
    path.mkdir()
    # ninja lies beside python in a virtual environment, so its folder must not be on the PATH either.
    for tool in ("sh", "bash", "env", "uname", "ls", "cat", "grep", "sed", "ps", "id", "hostname", "ldconfig"):
        if found := shutil.which(tool):
            (path / tool).symlink_to(found)
    extensions = folder / "extensions"
    extensions.mkdir()
    assert all(shutil.which(tool, path=str(path)) is None for tool in ("gcc", "g++", "cc", "clang", "ninja"))
    env = {"PATH": str(path), "TORCH_EXTENSIONS_DIR": str(extensions)}
    done = medmamba(*DIRECT, "--store", str(folder / "store"), env=env, cwd=folder, timeout_s=500)
    assert list(extensions.iterdir()) == [], "something was compiled"
    return json.loads(done.stdout)


def test_a_killed_driver_resumes_to_the_same_metrics(uninterrupted, tmp_path):
    store = tmp_path / "store"
    # Without a compiler the undisturbed run had this scan; another one differs in the last bits.
    arguments = [*DIRECT, "--store", str(store), "--placement.scan", "numba"]
    with (tmp_path / "said").open("w") as said:
        driver = subprocess.Popen(command(*arguments), env=environment(), cwd=tmp_path, stderr=said)
    deadline = time.monotonic() + 400
    while _epochs_saved(store) < 2:
        assert driver.poll() is None, f"ended before it could be killed:\n{(tmp_path / 'said').read_text()[-3000:]}"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    saved = _epochs_saved(store)
    shards = {path.name: path.stat().st_mtime_ns for path in (store / "datasets/phantoms/default/shards").iterdir()}
    assert saved < 6, "the training was over before the kill"
    assert not (store / "runs/night/train/record.json").exists()

    done = medmamba(*arguments, cwd=tmp_path, timeout_s=500)
    facts = json.loads(done.stdout)
    assert "training resumes after epoch" in done.stderr
    for name, value in uninterrupted["evaluate"]["metrics"].items():
        assert facts["evaluate"]["metrics"][name] == pytest.approx(value, abs=1e-6), name
    assert facts["train"]["digest"] == uninterrupted["train"]["digest"], "the weights differ in a bit"
    again = {path.name: path.stat().st_mtime_ns for path in (store / "datasets/phantoms/default/shards").iterdir()}
    assert again == shards, "a shard was made twice"

    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments)
    # shard, train, evaluate, report, register, promote
    assert len(runs) == 6
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [version.version for version in client.search_model_versions("name = 'medmamba-phantoms'")] == ["1"] or [
        int(version.version) for version in client.search_model_versions("name = 'medmamba-phantoms'")
    ] == [1]


@pytest.mark.slow  # a third driver; tests/cluster/test_portable_checkpoints.py has the numbers
def test_a_training_resumes_on_another_number_of_workers(tmp_path):
    store = tmp_path / "store"
    arguments = ["train", *TINY, "--train.epochs", "4", "--run", "ranks", "--store", str(store)]
    with (tmp_path / "said").open("w") as said:
        driver = subprocess.Popen(command(*arguments), env=environment(), cwd=tmp_path, stderr=said)
    deadline = time.monotonic() + 300
    while _epochs_saved(store, "ranks") < 1:
        assert driver.poll() is None, (tmp_path / "said").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = medmamba(*arguments, "--placement.workers", "2", "--placement.zero-stage", "1", cwd=tmp_path)
    assert "training resumes after epoch" in done.stderr
    assert _epochs_saved(store, "ranks") == 4


def _epochs_saved(store: Path, run: str = "night") -> int:
    """Epochs in the newest whole checkpoint of the training."""
    states = sorted((store / "runs" / run / "train/checkpoints").glob("step-*/train.json"))
    try:
        return json.loads(states[-1].read_text())["epoch"] if states else 0
    except (json.JSONDecodeError, FileNotFoundError):
        return 0
