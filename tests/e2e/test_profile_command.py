"""`medmamba train --profile` from the command line: its tables, its trace, and what MLflow knows of the speed."""

import gzip
import json

import pytest
from chain import TINY, medmamba
from mlflow import MlflowClient

pytestmark = pytest.mark.slow  # a run with Ray; cluster/test_profiled_training.py profiles without


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The folder of a profiled training, and what it printed."""
    folder = tmp_path_factory.mktemp("profiled")
    return folder, medmamba("train", *TINY, "--run", "r", "--store", str(folder / "store"), "--profile", cwd=folder)


def test_a_profile_fits_80_columns_and_its_trace_is_readable(profiled):
    folder, done = profiled
    told = done.stdout[done.stdout.index("Steps ") :].splitlines()
    trace = folder / "store/runs/r/train/profile/trace.json.gz"
    assert told[-1] == str(trace)
    assert max(map(len, told[:-1])) <= 80
    record = json.loads((folder / "store/runs/r/train/record.json").read_text())
    profile = record["facts"]["profile"]
    assert len(profile["largest"]) == 10
    assert all(row["name"][:20] in done.stdout for row in profile["largest"])
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in events) == profile["steps"]


def test_the_last_line_and_mlflow_tell_how_fast_the_training_was(profiled):
    folder, done = profiled
    assert any(line.startswith("trained 2 epochs in 0:") and "images/s" in line for line in done.stderr.splitlines())
    facts = json.loads((folder / "store/runs/r/train/record.json").read_text())["facts"]
    client = MlflowClient(f"sqlite:///{folder}/store/mlflow.db")
    run = client.get_run(facts["mlflow_run"])
    assert run.data.metrics["images_per_s_sustained"] == pytest.approx(facts["usage"]["images_per_s_sustained"])
    for name in ("images_per_s_last", "step_ms", "data_wait_share", "validation_s"):
        assert [point.step for point in client.get_metric_history(facts["mlflow_run"], name)] == [1, 2], name
    assert [point.step for point in client.get_metric_history(facts["mlflow_run"], "checkpoint_s")] == [2]
    assert facts["usage"]["gpus"] == {}
    assert "medmamba.slow" not in run.data.tags
    timed = {"images_per_s_last", "step_ms", "checkpoint_s"}
    assert not any(timed & epoch.keys() for epoch in facts["history"])


def test_a_finished_training_has_nothing_left_to_profile(profiled):
    folder, _ = profiled
    again = medmamba("train", "--run", "r", "--store", str(folder / "store"), "--profile", cwd=folder)
    assert "the training of run r is finished, so there is nothing to profile" in again.stderr
    assert "--run NAME" in again.stderr
