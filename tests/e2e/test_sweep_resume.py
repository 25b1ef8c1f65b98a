"""A sweep of real trainings whose driver is killed and interrupted: it ends as one that nobody disturbed."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from chain import TINY, command, environment, medmamba
from mlflow import MlflowClient

from data_shards.store import Store, open_store

pytestmark = pytest.mark.slow  # about ten drivers
SWEEP = [
    "tune",
    *TINY,
    "--tune.trials",
    "4",
    "--tune.epochs",
    "6",
    "--placement.concurrent-trials",
    "1",
    "--json",
    "--placement.checkpoint-steps",
    "2",
]  # in the middle of epochs too
KILLS = [(1, signal.SIGKILL), (4, signal.SIGINT), (7, signal.SIGKILL), (9, signal.SIGTERM)]
"""After so many epochs of all trials together, this signal."""
STEP = "runs/quickstart/tune"
REPEATED = re.compile(r"epoch|step|train_loss|learning_rate|val_.*")
"""The figures that do not depend on the machine's speed."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict, list[dict]]:
    """The facts and the records of a sweep."""
    folder = tmp_path_factory.mktemp("undisturbed")
    facts = json.loads(medmamba(*SWEEP, "--store", str(folder / "store"), cwd=folder).stdout)["tune"]
    return facts, records(open_store(str(folder / "store" / STEP)))


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path, monkeypatch) -> tuple[str, dict[str, str]]:
    """A store, and the environment that its commands need."""
    if request.param == "folder":
        return f"{tmp_path}/store", {}
    uri = request.getfixturevalue("s3")
    server = {"MLFLOW_TRACKING_URI": request.getfixturevalue("mlflow_server")}
    return f"{uri}/store", {**request.getfixturevalue("s3_server").env, **server}


def records(out: Store) -> list[dict]:
    """The trials' records, by number."""
    return [json.loads(out.get(key)) for key in out.list("trials/") if re.fullmatch(r"trials/[1-4]\.json", key)]


def repeatable(found: list[dict]) -> list[dict]:
    """The records without what differs between two sweeps that try and find the same."""
    plain = []
    for record in found:
        epochs = [
            {**each, "metrics": {name: value for name, value in each["metrics"].items() if REPEATED.fullmatch(name)}}
            for each in record["epochs"]
        ]
        plain.append({**record, "id": "", "epochs": epochs})
    return plain


def disturb(store: str, env: Mapping[str, str], epochs: int, sent: signal.Signals, cwd: Path) -> None:
    """Begins or resumes the sweep, and sends its driver a signal once so many epochs are recorded."""
    out = open_store(f"{store}/{STEP}")
    process = subprocess.Popen(
        command(*SWEEP, "--store", store), env=environment(env), cwd=cwd, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while sum(len(record["epochs"]) for record in records(out)) < epochs:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    _, told = process.communicate(timeout=100)
    assert process.returncode != 0, told


def forget(out: Store) -> None:
    """Takes the last two epochs from the trial that was running: as if its driver had been killed before it heard of
    them. At least the first of the two is in a checkpoint of the trial's own."""
    for record in records(out):
        if record["state"] == "running":
            kept = {**record, "epochs": record["epochs"][:-2]}
            out.put(f"trials/{record['number']}.json", json.dumps(kept).encode())


def trial_runs(client: MlflowClient, parent: str) -> list:
    experiments = [each.experiment_id for each in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'")


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def plant(store: Store, ran: Path) -> None:
    """Puts pickles wherever Ray or this project has ever kept something, and where somebody might look for it."""
    evil = pickle.dumps(Evil(ran))
    state = {"trial_data": [], "runner_data": {"_type": "CLOUDPICKLE_FALLBACK", "value": evil.hex()}}
    trial = "ray/trial_3befb4eb_1_train_optim_lr=0.0020_2026-12-01_00-04-52"
    names = ("tuner.pkl", "trainable.pkl", "searcher-state-2026-12-01_00-04-52.pkl", "error.pkl", "params.pkl",
             "search_gen_state-2026-12-01_00-04-52.json", "checkpoint_manager_snapshot.json")  # fmt: skip
    out = store.at(STEP)
    for folder in ("", "ray/", f"{trial}/", "trials/", *(f"trials/{record['id']}/" for record in records(out))):
        for name in names:
            out.put(f"{folder}{name}", evil)
        out.put(f"{folder}experiment_state-2026-12-01_00-04-52.json", json.dumps(state).encode())
        out.put(f"{folder}checkpoint_000001/engine/mp_rank_00_model_states.pt", evil)
    for name in [key for key in out.list("trials/") if "/checkpoints/" in key and key.endswith("train.json")]:
        out.put(f"{name.rpartition('/')[0]}/moments.pkl", evil)
    out.put("trials/99.json", evil)


def test_a_killed_interrupted_sweep_ends_as_an_undisturbed_one(place, undisturbed, tmp_path):
    store, env = place
    for epochs, sent in KILLS:
        disturb(store, env, epochs, sent, tmp_path)
        plant(open_store(store), tmp_path / "ran")
        if sent == signal.SIGINT:
            forget(open_store(f"{store}/{STEP}"))
    done = medmamba(*SWEEP, "--store", store, env=env, cwd=tmp_path)
    assert "the sweep resumes where it was interrupted" in done.stderr
    assert "trials/99.json was edited or damaged" in done.stderr
    assert not (tmp_path / "ran").exists()

    out, (facts_before, records_before) = open_store(f"{store}/{STEP}"), undisturbed
    facts = json.loads(done.stdout)["tune"]
    assert repeatable(records(out)) == repeatable(records_before)
    assert {record["state"] for record in records_before} == {"ended", "stopped"}
    assert (facts["winner"], facts["winner_number"]) == (facts_before["winner"], facts_before["winner_number"])
    assert facts["digest"] == facts_before["digest"]
    assert not [key for key in out.list() if "/checkpoints/" in key or key.startswith("ray/")]

    client = MlflowClient(env.get("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db"))
    runs = {run.info.run_id: run for run in trial_runs(client, facts["mlflow_run"])}
    assert sorted(runs) == sorted(row["mlflow_run"] for row in facts["trials"])
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for row in facts["trials"]:
        logged = client.get_metric_history(row["mlflow_run"], "train_loss")
        assert sorted(point.step for point in logged) == list(range(1, row["epochs"] + 1))
        steps = [point.step for point in client.get_metric_history(row["mlflow_run"], "step_loss")]
        assert len(steps) == len(set(steps))
