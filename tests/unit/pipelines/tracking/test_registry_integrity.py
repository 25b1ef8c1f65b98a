"""A registered model whose files were replaced in the artifact store is not used, whoever loads it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import registered
import torch
from safetensors.torch import load, save

from data_shards.store import open_store
from medmamba.checkpoint import MODEL, WEIGHTS, CheckpointError, model_digest, save_model
from medmamba.config import MedMambaConfig
from medmamba.model import build_model
from pipelines.cli import main
from pipelines.predict.classify import classify
from pipelines.steps.evaluate import evaluate_rank
from pipelines.tracking import open_tracking, registry
from pipelines.tracking.registry import (
    DIGEST_TAG,
    PACKAGE_TAG,
    IntegrityError,
    by_alias,
    by_number,
    loaded,
    package_digest,
)

NAME = "medmamba-phantoms"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(store, tracking, folder of the packaged model in it), with a champion."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    tracking = open_tracking(store)
    registered.released(store, tracking, "first", auc=0.9)
    (weights,) = Path(store.uri).glob("mlflow-artifacts/**/weights.safetensors")
    return store, tracking, weights.parents[1]


@pytest.fixture
def package(release, tmp_path):
    """The packaged model in the artifact store; as it was again after the test."""
    folder = release[2]
    shutil.copytree(folder, tmp_path / "before")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "before", folder)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(registered.coded(registered.images()[0]))
    return path


def other_weights(package: Path, owned: Path) -> None:
    state = load((package / "artifacts" / WEIGHTS).read_bytes())
    torch.manual_seed(1)
    state["head.weight"] = torch.randn_like(state["head.weight"])
    (package / "artifacts" / WEIGHTS).write_bytes(save(state))


def a_flipped_bit(package: Path, owned: Path) -> None:
    data = bytearray((package / "artifacts" / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (package / "artifacts" / WEIGHTS).write_bytes(data)


def swapped_classes(package: Path, owned: Path) -> None:
    card = package / "artifacts" / MODEL
    card.write_text(
        card.read_text().replace("ellipse", "x").replace("spiculated", "ellipse").replace('"x"', '"spiculated"')
    )


def both_with_a_digest_that_fits(package: Path, owned: Path) -> None:
    """Consistent in itself: only the registry's tags know."""
    before = model_digest(*((package / "artifacts" / name).read_bytes() for name in (WEIGHTS, MODEL)))
    other_weights(package, owned)
    swapped_classes(package, owned)
    after = model_digest(*((package / "artifacts" / name).read_bytes() for name in (WEIGHTS, MODEL)))
    text = (package / "MLmodel").read_text()
    assert before in text
    (package / "MLmodel").write_text(text.replace(before, after))


def code_that_runs(package: Path, owned: Path) -> None:
    for path in package.glob("*.py"):
        path.write_text(f"open({str(owned)!r}, 'w').close()\n{path.read_text()}")


def a_module_that_runs(package: Path, owned: Path) -> None:
    path = package / "code" / "medmamba" / "checkpoint.py"
    path.write_text(f"open({str(owned)!r}, 'w').close()\n{path.read_text()}")


def an_added_file(package: Path, owned: Path) -> None:
    (package / "code" / "json.py").write_text(f"open({str(owned)!r}, 'w').close()\n")


def a_removed_file(package: Path, owned: Path) -> None:
    (package / "code" / "medmamba" / "finetune.py").unlink()


WEIGHTS_OR_CARD = [other_weights, a_flipped_bit, swapped_classes, both_with_a_digest_that_fits]
CODE = [code_that_runs, a_module_that_runs, an_added_file, a_removed_file]


@pytest.mark.parametrize("attack", [*WEIGHTS_OR_CARD, *CODE], ids=lambda attack: attack.__name__)
def test_nothing_of_a_version_with_replaced_files_is_used(release, package, image, tmp_path, attack):
    store, tracking, _ = release
    attack(package, tmp_path / "owned")
    with pytest.raises(IntegrityError, match=rf"models:/{NAME}/1 .*{PACKAGE_TAG}.*restore them, or delete the version"):
        classify([image], store=store, tracking=tracking)
    assert not (tmp_path / "owned").exists()


def test_the_command_says_so_in_one_line_and_fails(release, package, image, capsys, tmp_path):
    other_weights(package, tmp_path / "owned")
    assert main(["predict", str(image), "--store", release[0].uri]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "replaced" in told.err
    assert "Traceback" not in told.err


def test_caches_next_to_a_model_loaded_in_place_change_nothing(release, package, image):
    store, tracking, _ = release
    (package / "code" / "medmamba" / "__pycache__").mkdir(exist_ok=True)
    (package / "code" / "medmamba" / "__pycache__" / "checkpoint.cpython-311.pyc").write_bytes(b"x")
    (package / "registered_model_meta").write_text("model_name: m\n")
    assert classify([image], store=store, tracking=tracking)[0]["version"] == 1


def without_tag(version, name):
    return type(version)(version.model, version.number, {k: v for k, v in version.tags.items() if k != name}, "")


@pytest.fixture
def earlier(release):
    """The version as it was registered before packages had a digest."""
    return without_tag(by_alias(release[1], NAME, "champion"), PACKAGE_TAG)


@pytest.mark.parametrize("attack", WEIGHTS_OR_CARD, ids=lambda attack: attack.__name__)
def test_of_an_earlier_version_weights_and_card_are_checked(release, package, earlier, tmp_path, attack):
    attack(package, tmp_path / "owned")
    with (
        pytest.raises(IntegrityError, match=r"cannot be loaded: .* is recorded: one or both were replaced"),
        loaded(release[1], earlier),
    ):
        pass


@pytest.mark.parametrize("attack", [None, *CODE], ids=lambda attack: attack and attack.__name__)
def test_of_an_earlier_version_the_code_inside_is_not_run(release, package, earlier, tmp_path, attack):
    if attack:
        attack(package, tmp_path / "owned")
    image = registered.images()[0]
    with loaded(release[1], earlier) as classifier:
        found = classifier.predict(None, [image]).to_numpy()
    np.testing.assert_allclose(found, registered.direct_scores(release[0], "first", [image]), atol=1e-6)
    assert not (tmp_path / "owned").exists()


def test_a_version_without_a_digest_is_not_used(release):
    version = without_tag(by_alias(release[1], NAME, "champion"), DIGEST_TAG)
    with pytest.raises(IntegrityError, match="cannot be checked"), loaded(release[1], version):
        pass


def test_the_tag_is_that_of_the_files_in_the_store(release):
    assert by_alias(release[1], NAME, "champion").tags[PACKAGE_TAG] == package_digest(release[2])


@pytest.mark.parametrize("attack", [other_weights, a_flipped_bit, swapped_classes], ids=lambda attack: attack.__name__)
def test_the_packaged_model_refuses_replaced_weights_and_card(release, package, tmp_path, attack):
    import mlflow.pyfunc

    assert mlflow.pyfunc.load_model(str(package), model_config={"device": "cpu"})
    attack(package, tmp_path / "owned")
    with pytest.raises(CheckpointError, match="one or both were replaced"):
        mlflow.pyfunc.load_model(str(package))


def test_the_packaged_model_refuses_to_load_without_its_digest(package):
    import mlflow.pyfunc

    text = (package / "MLmodel").read_text()
    (package / "MLmodel").write_text("\n".join(line for line in text.splitlines() if "  digest:" not in line))
    with pytest.raises(ValueError, match="has no digest of the weights"):
        mlflow.pyfunc.load_model(str(package))


@pytest.mark.parametrize("name", [WEIGHTS, MODEL])
def test_evaluation_refuses_weights_unlike_the_trainings(release, name):
    from pipelines.placement import Placement
    from pipelines.worker.job import EvaluateJob

    store, train = release[0], registered.facts(release[0], "evaluated", auc=0.9)["train"]
    store.put(f"{train['model']}/{name}", store.get(f"{train['model']}/{name}") + b" ")
    placement = Placement(
        workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="auto", concurrent_trials=1, nodes=1
    )
    model = (store.at(train["model"]), train["digest"])
    dataset = (store.at("datasets"), "0" * 64)  # not looked at: the model is refused first
    job = EvaluateJob(name="evaluate", placement=placement, dataset=dataset, model=model, micro_batch=8)
    with pytest.raises(CheckpointError, match=rf"{train['digest'][:12]} is recorded"):
        evaluate_rank(job, 0)


def test_the_version_carries_its_baselines_for_the_gate(release):
    store, tracking, _ = release
    around = registered.context(store, tracking, "with-baselines")
    before = registered.facts(store, around.run, auc=0.877)
    before["evaluate"] |= {
        "baselines": {"chance": {"auc": 0.5}, "pixels": {"auc": 0.897, "f1": 0.25}},
        "absent_baselines": {"size": "no class b in training"},
    }
    facts = registered.register_run(around, before, "baselines")
    tags = by_number(tracking, "baselines", 1).tags
    kept = {name: value for name, value in tags.items() if name.startswith("baseline_")}
    assert kept == {
        "baseline_chance_auc": "0.5", "baseline_pixels_auc": "0.897", "baseline_pixels_f1": "0.25",
        "baseline_size_absent": "no class b in training",
    }  # fmt: skip
    found = registered.promote_run(around, facts)
    assert found["verdict"] == "no"
    assert "0.8770 of version 1 is more than 0.01 below the baseline's 0.8970" in found["reason"]
    assert by_alias(tracking, "baselines", "champion") is None


def test_packaging_again_gives_equal_bytes_without_local_paths(tmp_path):
    """An upload that is repeated after an interruption must have the digest that the version's tag names."""
    config = MedMambaConfig(dims=(8, 16), depths=(1, 1), num_classes=2)
    card = {"classes": ["a", "b"], "task": "multiclass", "image_size": 32, "channels": 1, "dataset": "d"}
    save_model(tmp_path / "checkpoint", build_model(config), config, card=card)
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "elsewhere")
    for name, checkpoint in (("one", "checkpoint"), ("two", "elsewhere")):
        registry.package(tmp_path / name, tmp_path / checkpoint, ["a", "b"])
    assert package_digest(tmp_path / "one") == package_digest(tmp_path / "two")
    assert str(tmp_path) not in (tmp_path / "one" / "MLmodel").read_text()
