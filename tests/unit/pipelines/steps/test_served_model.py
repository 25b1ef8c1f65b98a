"""The registered model as MLflow serves it: calibrated, raw on request, and clear about rows that are not images."""

import base64
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import registered

from data_shards.store import open_store
from pipelines.predict.classify import classify
from pipelines.tracking import open_tracking
from pipelines.tracking.registry import IntegrityError, by_alias, loaded

TEMPERATURE = 2.5
GOOD = [registered.coded(image) for image in registered.images()]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(store, tracking) with a champion whose calibration has a temperature."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    around = registered.context(store, open_tracking(store), "first")
    before = registered.calibrate(store, "first", registered.facts(store, "first", auc=0.9), TEMPERATURE)
    facts = registered.register_run(around, before)
    registered.promote_run(around, facts)
    return store, around.tracking, facts, before


def request(images: list[bytes]) -> dict:
    rows = [[base64.b64encode(image).decode()] for image in images]
    return {"dataframe_split": {"columns": ["image"], "data": rows}}


@pytest.fixture(scope="module")
def answers(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    requests = [GOOD, [GOOD[0], b"not an image", GOOD[1], b"\x89PNG\r\n\x1a\n and no more"]]
    (folder / "requests.json").write_text(json.dumps([request(images) for images in requests]))
    env = {**os.environ, "MLFLOW_TRACKING_URI": release[1].uri}
    files = [str(folder / "requests.json"), str(folder / "answers.json")]
    command = [sys.executable, "-c", registered.SERVE_ELSEWHERE, "models:/medmamba-phantoms@champion", *files]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize(("kind", "temperature"), [("calibrated", TEMPERATURE), ("raw", 1.0)])
def test_served_probabilities_are_calibrated_or_raw(release, answers, kind, temperature):
    status, answer = answers[kind][0]
    assert status == 200
    expected = registered.direct_scores(release[0], "first", registered.images(), temperature)
    found = [[row[name] for name in registered.CLASSES] for row in answer["predictions"]]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_all_bad_rows_of_a_request_are_named_in_one_line(answers):
    status, answer = answers["calibrated"][1]
    assert status == 400
    assert answer.keys() == {"error_code", "message"}
    assert answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert answer["message"].startswith("2 of 4 rows cannot be used, so none was predicted: image 1 cannot be decoded")
    assert "; image 3 cannot be decoded" in answer["message"]
    assert "image 0" not in answer["message"]
    assert "\n" not in answer["message"]


def test_predict_uses_the_calibration_and_the_digest_stays(release, tmp_path):
    store, tracking, facts, before = release
    assert facts["model_digest"] == before["train"]["digest"]
    path = tmp_path / "image.png"
    path.write_bytes(GOOD[0])
    (row,) = classify([path], store=store, tracking=tracking)
    images = registered.images()[:1]
    expected = registered.direct_scores(store, "first", images, TEMPERATURE)
    np.testing.assert_allclose(list(row["scores"].values()), expected[0], atol=1e-6)
    champion = by_alias(tracking, "medmamba-phantoms", "champion")
    with loaded(tracking, champion, calibrated=False) as classifier:
        raw = classifier.predict(None, images).to_numpy()
    np.testing.assert_allclose(raw, registered.direct_scores(store, "first", images), atol=1e-6)


def test_a_replaced_calibration_is_refused(release):
    store, tracking, *_ = release
    (key,) = [key for key in store.list("mlflow-artifacts") if key.endswith("/artifacts/calibration.json")]
    kept = store.get(key)
    store.put(key, kept.replace(b"2.5", b"9.5"))
    champion = by_alias(tracking, "medmamba-phantoms", "champion")
    with pytest.raises(IntegrityError, match="files were replaced"), loaded(tracking, champion):
        pass
    store.put(key, kept)


def test_a_calibration_of_another_model_is_not_registered(release):
    store, tracking, _, before = release
    around = registered.context(store, tracking, "other")
    other = {**before, "evaluate": {**before["evaluate"]}}
    changed = json.loads(store.get(before["evaluate"]["calibration"])) | {"model": "0" * 64}
    other["evaluate"]["calibration"] = "runs/other/evaluate/calibration.json"
    store.put(other["evaluate"]["calibration"], json.dumps(changed).encode())
    with pytest.raises(ValueError, match="belongs to the model 0000"):
        registered.register_run(around, other)
