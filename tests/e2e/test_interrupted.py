"""A sweep that is interrupted or fails for a reason that passes: it says so, and the same command goes on with it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from chain import TINY, command, environment, medmamba
from mlflow import MlflowClient

from data_shards.store import open_store
from pipelines.worker.checkpoint.stored import Checkpoints

pytestmark = pytest.mark.slow  # nine drivers are started and interrupted
RESUMES = "medmamba: interrupted; run the same command to resume"


def runs(store) -> list:
    """All MLflow runs of a store, deleted ones not."""
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    return client.search_runs([each.experiment_id for each in client.search_experiments()])


def trials(store) -> list:
    return [run for run in runs(store) if "medmamba.trial" in run.data.tags]


def epochs_saved(step: Path) -> int:
    """Epochs in the newest checkpoint of the training, or of all trials together."""
    trainings = [step, *(step / "trials").glob("*")]
    states = [Checkpoints(open_store(str(folder))).newest_state() for folder in trainings]
    return sum(state["epoch"] for state in states if state)


def interrupt(arguments: list[str], sent: signal.Signals, step: Path, cwd: Path, *, group: bool = False) -> None:
    """Begins a command, sends it a signal once another epoch is saved, and holds that it calls itself interrupted.

    `group`: the signal goes to its whole process group, as `timeout` and systemd send it, and so to Ray as well.
    """
    before = epochs_saved(step)
    process = subprocess.Popen(
        command(*arguments), env=environment(), cwd=cwd, stderr=subprocess.PIPE, text=True,
        # What a shell starts in the background ignores Ctrl-C, and so do its children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL), start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while epochs_saved(step) <= before:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (os.killpg if group else os.kill)(process.pid, sent)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 1, told
    assert told.splitlines()[-1] == RESUMES


def test_an_interrupted_sweep_is_no_success_and_goes_on(tmp_path):
    store = tmp_path / "store"
    arguments = ["tune", *TINY, "--tune.epochs", "6", "--tune.trials", "3", "--store", str(store), "--json"]
    step = store / "runs/quickstart/tune"
    for sent, group in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)):
        interrupt(arguments, sent, step, tmp_path, group=group)
        assert not (step / "record.json").exists()
        assert {run.info.status for run in runs(store)} <= {"FINISHED", "KILLED"}

    done = medmamba(*arguments, cwd=tmp_path)
    assert "the sweep resumes" in done.stderr
    facts = json.loads(done.stdout)["tune"]
    assert len(facts["trials"]) == 3
    assert {run.info.run_id for run in trials(store)} == {row["mlflow_run"] for row in facts["trials"]}
    assert {run.info.status for run in runs(store)} == {"FINISHED"}


def test_a_sweep_resumes_trials_that_failed_for_passing_reasons(tmp_path):
    store = tmp_path / "store"
    arguments = [*TINY, "--store", str(store), "--json"]
    medmamba("shard", *arguments, cwd=tmp_path)
    # An earlier version left this of a sweep that it had just begun.
    stray = store / "runs/quickstart/tune/ray/tuner.pkl"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"")
    shards = store / "datasets/phantoms/default/shards"
    shards.rename(shards.with_name("away"))
    failed = medmamba("tune", *arguments, "--workflow", "release", cwd=tmp_path, code=1)
    assert "starts again; 0 trials with 0 epochs are lost" in failed.stderr
    assert not stray.exists()
    assert "2 of 2 trials failed for reasons other than divergence" in failed.stderr
    assert "run the same command to try them again" in failed.stderr
    shards.with_name("away").rename(shards)

    done = medmamba("tune", *arguments, "--workflow", "release", cwd=tmp_path)
    assert "the sweep resumes" in done.stderr
    facts = json.loads(done.stdout)["tune"]
    assert [row["error"] for row in facts["trials"]] == [None, None]
    assert {run.info.run_id for run in trials(store)} == {row["mlflow_run"] for row in facts["trials"]}
    assert {run.info.status for run in runs(store)} == {"FINISHED"}


def test_ctrl_c_in_training_is_not_success_and_it_resumes(tmp_path):
    store = tmp_path / "store"
    arguments = ["train", *TINY, "--train.epochs", "6", "--store", str(store), "--json"]
    interrupt(arguments, signal.SIGINT, store / "runs/quickstart/train", tmp_path)
    assert {run.info.status for run in runs(store)} == {"FINISHED", "KILLED"}
    done = medmamba(*arguments, cwd=tmp_path)
    assert "training resumes after epoch" in done.stderr
    assert {run.info.status for run in runs(store)} == {"FINISHED"}
