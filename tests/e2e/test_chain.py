"""The whole chain with the store on S3 and MLflow as a server: images in, a promoted model out."""

from __future__ import annotations

import io
import json

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from chain import TINY, medmamba
from mlflow import MlflowClient
from PIL import Image

from data_shards.config import PhantomConfig
from data_shards.manifest import open_dataset
from data_shards.source.phantoms import phantom
from data_shards.store import open_store
from pipelines.evaluation.calibrator import read_calibrator
from pipelines.evaluation.parts import Study
from pipelines.evaluation.predictions import read_predictions
from pipelines.evaluation.study import study

MODEL = "medmamba-phantoms"


@pytest.fixture(scope="module")
def services(s3_server, mlflow_server):
    """Environment and store of a chain that uses a real S3 server and a real MLflow server."""
    store = f"{s3_server.uri}/chain"
    return {**s3_server.env, "MLFLOW_TRACKING_URI": mlflow_server, "MEDMAMBA_STORE": store}


@pytest.fixture(scope="module")
def released(services, tmp_path_factory):
    """What `medmamba run release` printed, and the folder it was called in."""
    cwd = tmp_path_factory.mktemp("release")
    return medmamba("run", "release", "--run", "first", "--json", *TINY, env=services, cwd=cwd), cwd


@pytest.fixture(scope="module")
def facts(released):
    return json.loads(released[0].stdout)


@pytest.fixture(scope="module")
def client(mlflow_server, released):
    return MlflowClient(mlflow_server)


@pytest.fixture
def store(services, monkeypatch):
    for name, value in services.items():
        monkeypatch.setenv(name, value)
    return open_store(services["MEDMAMBA_STORE"])


def test_the_champion_is_the_version_that_the_release_registered(facts, client):
    version = client.get_model_version_by_alias(MODEL, "champion")
    assert int(version.version) == facts["register"]["version"] == 1
    assert version.tags["medmamba.manifest"] == facts["shard"]["digest"]
    assert version.tags["medmamba.record"].endswith("/runs/first/register")
    assert float(version.tags["test_auc"]) == pytest.approx(facts["evaluate"]["metrics"]["auc"], abs=1e-12)


def test_the_shards_are_on_s3_and_nothing_is_written_locally(facts, store, released, s3_server):
    data = open_dataset(store.at(facts["shard"]["data"]))
    assert data.digest == facts["shard"]["digest"]
    names = {shard.name for shard in data.manifest.shards}
    s3 = boto3.client("s3", endpoint_url=s3_server.endpoint)
    listed = s3.list_objects_v2(Bucket="medmamba-tests", Prefix="chain/datasets/phantoms/default/shards/")["Contents"]
    assert {key["Key"].rpartition("/")[2].removesuffix(".tar") for key in listed} == names
    assert list(released[1].iterdir()) == []


def test_no_object_of_the_store_holds_the_key_that_opens_it(facts, store, services):
    secrets = [services[name].encode() for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")]
    kept = list(store.list())
    assert any(key.endswith("tune/trials/1.json") for key in kept)
    assert not [key for key in kept if any(secret in store.get(key) for secret in secrets)]


def test_no_object_of_the_store_is_a_pickle(facts, store):
    def is_pickle(data: bytes) -> bool:
        in_zip = data[:2] == b"PK" and b"/data.pkl" in data  # by torch.save
        in_json = data[:1] == b"{" and b"CLOUDPICKLE" in data  # by Ray Tune
        return data[:1] == b"\x80" or in_zip or in_json

    kept = [key for key in store.list() if not key.endswith((".tar", ".png", ".jpg"))]
    assert not [key for key in kept if key.endswith((".pkl", ".pickle", ".pt")) or is_pickle(store.get(key))]


def test_the_test_auc_has_an_interval(facts):
    low, high = facts["evaluate"]["intervals"]["auc"]
    assert 0 <= low <= high <= 1


def test_every_test_image_was_predicted_exactly_once(facts, store):
    table = pq.read_table(io.BytesIO(store.get(facts["evaluate"]["predictions"])))
    index = open_dataset(store.at(facts["shard"]["data"])).index("test")
    assert table["key"].to_pylist() == index.key.tolist()
    assert np.allclose(np.array(table["scores"].to_pylist()).sum(1), 1, atol=1e-5)


def test_the_study_is_that_of_the_stored_predictions(facts, store):
    found = facts["evaluate"]
    test = read_predictions(store, found["predictions"], digest=found["digest"])
    validation = read_predictions(store, found["predictions"].replace(".parquet", "-val.parquet"))
    expected, calibrator = study(test, validation)
    assert Study.model_validate_json(store.get(found["study"])) == expected
    assert read_calibrator(store.get(found["calibration"]), model=facts["train"]["digest"]) == calibrator
    auc = expected.macro["auc"]
    assert (auc.value, [auc.low, auc.high]) == (pytest.approx(found["metrics"]["auc"]), found["intervals"]["auc"])
    assert validation.split == "val"
    assert len(validation) == facts["shard"]["samples"]["val"]


def test_mlflow_has_one_run_per_step_and_nested_trial_runs(facts, client):
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`medmamba.run` = 'first'")
    steps = sorted(run.data.tags["medmamba.step"] for run in runs)
    assert steps == ["evaluate", "promote", "register", "report", "shard", "train", "tune"]
    trials = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{facts['tune']['mlflow_run']}'")
    assert len(trials) == 2
    assert {run.info.status for run in [*runs, *trials]} == {"FINISHED"}
    assert {run.info.run_id for run in trials} == {row["mlflow_run"] for row in facts["tune"]["trials"]}


def test_the_training_used_what_the_sweep_found(facts):
    winner, resolved = facts["tune"]["winner"], facts["train"]["resolved"]
    assert resolved["train"]["optim"]["lr"] == winner["train.optim.lr"]
    assert resolved["train"]["batch_size"] == winner["train.batch_size"]
    assert resolved["model"]["drop_path"] == winner["model.drop_path"]


def test_asked_again_every_step_is_done_and_nothing_starts(facts, services, tmp_path):
    again = medmamba("run", "release", "--run", "first", "--json", *TINY, env=services, cwd=tmp_path)
    assert json.loads(again.stdout) == facts
    assert "starts" not in again.stderr
    assert "resumes" not in again.stderr


def test_another_configuration_is_drift_that_names_the_field(services, tmp_path, released):
    drift = medmamba(
        "run", "release", "--run", "first", *TINY, "--train.optim.lr", "0.5", env=services, cwd=tmp_path, code=2
    )
    assert "train.optim.lr: 0.002 -> 0.5" in drift.stderr
    assert "--run" in drift.stderr


def test_the_champion_classifies_an_image_file(released, services, tmp_path):
    pixels = phantom(PhantomConfig(side=32), 0, 1, 0)
    Image.fromarray(pixels.squeeze()).save(tmp_path / "image.png")
    rows = json.loads(medmamba("predict", "image.png", "--model", MODEL, "--json", env=services, cwd=tmp_path).stdout)
    assert set(rows[0]["scores"]) == {"no lesion", "smooth ellipse", "spiculated mass"}
    assert sum(rows[0]["scores"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow  # another whole run; the gate itself is tested on a real MLflow in unit/pipelines
def test_a_worse_model_is_refused_and_promoted_only_by_force(released, services, client, tmp_path):
    # A learning rate near zero leaves the weights where chance put them.
    worse = ["--run", "worse", *TINY, "--train.optim.lr", "1e-9", "--train.optim.warmup-epochs", "0"]
    first = medmamba("promote", "--gate.minimum", "0.99", *worse, env=services, cwd=tmp_path, code=3)
    assert "below the minimum" in first.stderr
    asked_again = medmamba("promote", "--run", "worse", env=services, cwd=tmp_path, code=3)
    assert "starts" not in asked_again.stderr
    assert client.get_model_version_by_alias(MODEL, "champion").version == "1"
    medmamba("promote", "--run", "worse", "--force", env=services, cwd=tmp_path)
    champion = client.get_model_version_by_alias(MODEL, "champion")
    assert champion.version == "2"
    assert champion.tags["medmamba.forced"] == "true"
