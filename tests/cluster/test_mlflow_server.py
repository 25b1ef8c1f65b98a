"""The registry over HTTP: a real MLflow server, with a local store and with one on S3."""

import os
import subprocess
import sys

import numpy as np
import pytest
import registered

from data_shards.store import open_store
from pipelines.predict.classify import classify
from pipelines.tracking import TrackingError, open_tracking
from pipelines.tracking.registry import by_alias, versions


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def load_elsewhere(tmp_path, uri: str, env: dict[str, str]):
    """What a fresh interpreter without this project predicts for the test images: (columns, frame, direct)."""
    given = {
        f"coded{i}": np.frombuffer(registered.coded(image), np.uint8) for i, image in enumerate(registered.images())
    }
    given |= {f"pixels{i}": image for i, image in enumerate(registered.images())}
    np.savez(tmp_path / "given.npz", **given)
    arguments = [uri, str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    environment = {**os.environ, **env, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-c", registered.LOAD_ELSEWHERE, *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(tmp_path / "found.npz")


def test_a_release_on_a_server_is_registered_and_loaded(mlflow_server, store, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    tracking = open_tracking(store)
    facts, verdict = registered.released(store, tracking, "one", auc=0.9, model="on-server")
    assert (facts["version"], verdict["verdict"]) == (1, "yes")
    facts, verdict = registered.released(store, tracking, "two", auc=0.8, model="on-server")
    assert (facts["version"], verdict["verdict"], verdict["previous"]) == (2, "no", 1)
    assert by_alias(tracking, "on-server", "champion").number == 1
    again = registered.context(store, tracking, "two")
    assert registered.register_run(again, registered.facts(store, "two", auc=0.8), "on-server")["version"] == 2
    assert len(versions(tracking, "on-server")) == 2

    expected = registered.direct_scores(store, "one", registered.images())
    found = load_elsewhere(tmp_path, "models:/on-server@champion", {"MLFLOW_TRACKING_URI": mlflow_server})
    np.testing.assert_allclose(found["frame"], np.concatenate([expected, expected]), atol=1e-6, rtol=0)
    np.testing.assert_allclose(found["direct"], expected, atol=1e-6, rtol=0)

    (tmp_path / "a.png").write_bytes(registered.coded(registered.images()[0]))
    (row,) = classify([tmp_path / "a.png"], store=store, model="on-server")
    np.testing.assert_allclose(list(row["scores"].values()), expected[0], atol=1e-6, rtol=0)


def test_with_a_store_on_s3_the_artifacts_lie_in_it(mlflow_server, s3, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    store = open_store(s3)
    tracking = open_tracking(store)
    _, verdict = registered.released(store, tracking, "one", auc=0.9, model="on-s3")
    assert verdict["verdict"] == "yes"
    kept = [key for key in store.list("mlflow-artifacts") if "/model-" in key]
    assert any(key.endswith("artifacts/weights.safetensors") for key in kept)
    (tmp_path / "a.png").write_bytes(registered.coded(registered.images()[0]))
    (row,) = classify([tmp_path / "a.png"], store=store, model="on-s3")
    assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-6)


def test_two_stores_on_one_server_do_not_share_runs(mlflow_server, tmp_path):
    first, second = (open_tracking(open_store(str(tmp_path / name)), mlflow_server) for name in "ab")
    assert first.experiment_id != second.experiment_id
    assert open_tracking(open_store(str(tmp_path / "a")), mlflow_server) == first


def test_a_server_that_is_not_mlflow_is_named(s3_server, store):
    with pytest.raises(TrackingError, match=s3_server.endpoint):
        open_tracking(store, s3_server.endpoint)
