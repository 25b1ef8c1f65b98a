"""The registered model and the gate, on a SQLite file."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import registered
from PIL import Image

from data_shards.store import open_store
from pipelines.console.arguments import UsageError
from pipelines.predict.classify import classify
from pipelines.steps.promote import DECISION, GateConfig
from pipelines.tracking import open_tracking
from pipelines.tracking.registry import by_alias, by_number, models_with_alias, move_alias, versions


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def tracking(store):
    return open_tracking(store)


@pytest.fixture
def model(request):
    """A registered model of the test's own."""
    return request.node.name[:100].replace("[", "-").replace("]", "")


@pytest.fixture(scope="module")
def champion(store, tracking):
    """Facts of a first release under the default name."""
    return registered.released(store, tracking, "first", auc=0.9)


def champion_of(tracking, model):
    version = by_alias(tracking, model, "champion")
    return version and version.number


def test_the_first_version_becomes_champion_with_origin_tags(store, tracking, champion):
    facts, verdict = champion
    assert (facts["model"], facts["version"]) == ("medmamba-phantoms", 1)
    assert verdict["verdict"] == "yes"
    assert verdict["previous"] is None
    assert "no champion yet" in verdict["reason"]
    version = by_alias(tracking, "medmamba-phantoms", "champion")
    assert version.tags["medmamba.record"] == store.at("runs", "first", "register").uri
    assert version.tags["medmamba.dataset"] == "phantoms"
    assert version.tags["medmamba.manifest"] == "m" * 64
    assert version.tags["medmamba.git_commit"]
    assert float(version.tags["test_auc"]) == 0.9
    assert tracking.client.get_run(version.run_id).data.metrics["test_auc"] == 0.9
    assert tracking.client.get_run(version.run_id).info.status == "FINISHED"


def test_the_model_loads_without_pickle_to_equal_probabilities(store, tracking, champion, tmp_path):
    images = registered.images()
    np.savez(tmp_path / "given.npz", **registered.given())
    env = {**os.environ, "MLFLOW_TRACKING_URI": tracking.uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    arguments = ["models:/medmamba-phantoms@champion", str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    command = [sys.executable, "-c", registered.LOAD_ELSEWHERE, *arguments]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "found.npz")
    expected = registered.direct_scores(store, "first", images)
    assert found["columns"].tolist() == registered.CLASSES
    np.testing.assert_allclose(found["frame"], np.concatenate([expected, expected]), atol=1e-6, rtol=0)
    np.testing.assert_allclose(found["direct"], expected, atol=1e-6, rtol=0)


def test_no_file_of_the_registered_model_is_a_pickle(store, champion):
    """Also after the test above has loaded it in place."""
    names = [key for key in store.list("mlflow-artifacts") if "/model-" in key]
    assert any(name.endswith("weights.safetensors") for name in names)
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pt"))]
    # Pickles of protocol 2 and later begin with this byte, whatever their name.
    assert not [name for name in names if store.get(name)[:1] == b"\x80"]


def test_files_are_predicted_by_the_champion(store, tracking, champion, tmp_path):
    images = registered.images()
    paths = [tmp_path / "grey.png", tmp_path / "colour.jpg", tmp_path / "small.png"]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(registered.coded(image, "JPEG" if path.suffix == ".jpg" else "PNG"))
    rows = classify(paths, store=store, model="medmamba-phantoms")
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    expected = registered.direct_scores(store, "first", images)
    found = np.array([list(row["scores"].values()) for row in rows])
    # JPEG changed the pixels of the second.
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], atol=1e-6, rtol=0)
    assert rows[0]["class"] == registered.CLASSES[int(expected[0].argmax())]


def test_a_gray_model_sees_a_color_copy_the_same(store, tracking, model, tmp_path):
    around = registered.context(store, tracking, f"{model}-a")
    facts = registered.register_run(around, registered.facts(store, around.run, auc=0.9, channels=1), model)
    registered.promote_run(around, facts)
    grey = registered.images()[0]
    shots = {"grey": grey, "copy": np.repeat(grey, 3, axis=2), "tinted": grey * np.array([1, 1, 0], np.uint8)}
    paths = [tmp_path / f"{name}.png" for name in shots]
    for path, image in zip(paths, shots.values(), strict=True):
        path.write_bytes(registered.coded(image))
    seen = [row["scores"] for row in classify(paths, store=store, model=model)]
    assert seen[0] == seen[1] != seen[2]
    tinted = np.asarray(Image.fromarray(shots["tinted"]).convert("L"))[..., None]
    np.testing.assert_allclose(
        list(seen[2].values()), registered.direct_scores(store, around.run, [tinted])[0], atol=1e-6
    )


def test_a_file_that_is_not_there_is_named(store, tmp_path):
    with pytest.raises(UsageError, match=r"missing.png was not found"):
        classify([tmp_path / "missing.png"], store=store)


def test_without_a_champion_prediction_says_what_to_do(tmp_path):
    (tmp_path / "a.png").write_bytes(registered.coded(registered.images()[0]))
    with pytest.raises(ValueError, match="train and promote one first"):
        classify([tmp_path / "a.png"], store=open_store(str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("auc", "verdict"), [(0.95, "yes"), (0.9, "yes"), (0.8999999, "no")], ids=["better", "equal", "a hair worse"]
)
def test_a_version_not_worse_than_the_champion_replaces_it(store, tracking, model, auc, verdict):
    registered.released(store, tracking, f"{model}-a", auc=0.9, model=model)
    _, found = registered.released(store, tracking, f"{model}-b", auc=auc, model=model)
    assert found["verdict"] == verdict
    assert found["previous"] == 1
    assert champion_of(tracking, model) == (2 if verdict == "yes" else 1)
    assert by_number(tracking, model, 2).tags["medmamba.verdict"].startswith(verdict)
    if verdict == "no":
        assert "0.9000 (version 1)" in found["reason"]


def test_a_champion_of_other_images_is_incomparable(store, tracking, model):
    registered.released(store, tracking, f"{model}-a", auc=0.6, model=model, manifest="n" * 64)
    _, found = registered.released(store, tracking, f"{model}-b", auc=0.9, model=model)
    assert found["verdict"] == "no"
    assert "cannot be compared" in found["reason"]
    assert found["reason"].endswith(f"`medmamba promote --run {model}-b --force`")
    assert champion_of(tracking, model) == 1
    _, forced = registered.released(store, tracking, f"{model}-c", auc=0.9, model=model, force=True)
    assert (forced["verdict"], forced["forced"], forced["previous"]) == ("yes", True, 1)
    version = by_alias(tracking, model, "champion")
    assert version.number == 3
    assert version.tags["medmamba.forced"] == "true"
    assert version.tags["medmamba.promoted_over"] == "1"


def test_a_metric_below_its_minimum_is_rejected_even_as_first(store, tracking, model):
    _, found = registered.released(store, tracking, f"{model}-a", auc=0.7, model=model, minimum=0.8)
    assert found["verdict"] == "no"
    assert "minimum of 0.8" in found["reason"]
    assert champion_of(tracking, model) is None


def test_a_version_without_the_metric_is_a_no(store, tracking, model):
    around = registered.context(store, tracking, f"{model}-a")
    before = registered.facts(store, around.run, auc=float("nan"))
    found = registered.promote_run(around, registered.register_run(around, before, model))
    assert (found["verdict"], "no test auc" in found["reason"]) == ("no", True)


def test_registering_again_makes_no_second_version(store, tracking, model):
    around = registered.context(store, tracking, f"{model}-a")
    before = registered.facts(store, around.run, auc=0.9)
    assert registered.register_run(around, before, model) == registered.register_run(around, before, model)
    assert len(versions(tracking, model)) == 1


def test_weights_changed_after_the_training_are_not_registered(store, tracking, model):
    around = registered.context(store, tracking, f"{model}-a")
    before = registered.facts(store, around.run, auc=0.9)
    key = f"{before['train']['model']}/weights.safetensors"
    store.put(key, store.get(key)[:-1] + b"\x00\x00")
    with pytest.raises(ValueError, match="another model"):
        registered.register_run(around, before, model)
    assert versions(tracking, model) == []
    assert (
        tracking.client.get_run(json.loads(store.get(f"runs/{around.run}/register/mlflow.json"))["run_id"]).info.status
        == "FAILED"
    )


def test_a_promotion_interrupted_after_moving_keeps_its_verdict(store, tracking, model):
    registered.released(store, tracking, f"{model}-a", auc=0.8, model=model)
    facts, first = registered.released(store, tracking, f"{model}-b", auc=0.9, model=model)
    again = registered.promote_run(registered.context(store, tracking, f"{model}-b"), facts)
    assert again == first
    assert again["previous"] == 1


def test_an_interrupted_promotion_decides_again_after_another(store, tracking, model):
    registered.released(store, tracking, f"{model}-a", auc=0.8, model=model)
    facts, _ = registered.released(store, tracking, f"{model}-b", auc=0.9, model=model)
    registered.released(store, tracking, f"{model}-c", auc=0.95, model=model)
    again = registered.promote_run(registered.context(store, tracking, f"{model}-b"), facts)
    assert (again["verdict"], again["previous"]) == ("no", 3)
    assert champion_of(tracking, model) == 3
    assert json.loads(store.get(f"runs/{model}-b/promote/{DECISION}"))["verdict"] == "no"


def test_a_version_that_is_gone_is_told(store, tracking, model):
    around = registered.context(store, tracking, f"{model}-a")
    facts = registered.register_run(around, registered.facts(store, around.run, auc=0.9), model)
    with pytest.raises(ValueError, match="version 7"):
        registered.promote_run(around, {**facts, "version": 7})


def test_prediction_asks_which_of_several_champions_to_use(store, tracking, champion, model, tmp_path):
    registered.released(store, tracking, f"{model}-a", auc=0.8, model=model)
    (tmp_path / "a.png").write_bytes(registered.coded(registered.images()[0]))
    with pytest.raises(ValueError, match=r"medmamba-phantoms.*--model"):
        classify([tmp_path / "a.png"], store=store)


def test_the_aliases_of_mlflow_itself_are_refused():
    for alias in ("latest", "v3", "two words"):
        with pytest.raises(ValueError, match="alias"):
            GateConfig(alias=alias)


def test_moving_an_alias_is_checked(tracking, champion):
    version = by_alias(tracking, "medmamba-phantoms", "champion")
    move_alias(tracking, version, "spare")
    assert by_alias(tracking, "medmamba-phantoms", "spare").number == version.number
    assert by_alias(tracking, "medmamba-phantoms", "missing") is None
    assert by_alias(tracking, "no-such-model", "champion") is None


def test_an_alias_is_found_among_more_models_than_one_page_holds(tracking, champion):
    for number in range(101):
        tracking.client.create_registered_model(f"a-{number}")
    move_alias(tracking, by_alias(tracking, "medmamba-phantoms", "champion"), "beyond-the-first-page")
    assert models_with_alias(tracking, "beyond-the-first-page") == ["medmamba-phantoms"]
