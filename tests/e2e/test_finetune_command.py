"""Sweep and training from a registered model and from an upstream checkpoint, as a user starts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import registered
from chain import TINY, medmamba
from mlflow import MlflowClient
from safetensors.torch import load_file

from data_shards.store import open_store
from medmamba.checkpoint import export_upstream
from medmamba.config import MedMambaConfig
from medmamba.model import build_model
from pipelines.tracking import open_tracking

MODEL = "medmamba-phantoms"


def params(store: Path, run_id: str) -> dict[str, str]:
    return MlflowClient(f"sqlite:///{store}/mlflow.db").get_run(run_id).data.params


@pytest.mark.slow  # two runs with Ray; cluster/test_finetuned.py holds what it does to weights
def test_a_release_starts_from_a_registered_model(tmp_path):
    store = open_store(str(tmp_path / "store"))
    registered.released(store, open_tracking(store), "old", auc=0.9)
    tuned = [
        "run", "release", *TINY, "--run", "tuned", "--until", "train", "--store", store.uri, "--json",
        "--train.init", f"models:/{MODEL}@champion", "--train.freeze", "patch_embed.*", "layers.0.*",
        "--train.optim.layer-decay", "0.7",
    ]  # fmt: skip
    done = medmamba(*tuned, cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert f"starting from models:/{MODEL}/1" in done.stderr
    assert "new head for 3 classes: the weights have other classes (no lesion, ellipse, spiculated)" in done.stderr
    assert "frozen: 32 of 115 parameters" in done.stderr

    origin = facts["train"]["init"]
    assert origin["uri"] == f"models:/{MODEL}/1"
    folder = Path(store.uri, "runs/tuned/train/model")
    assert json.loads((folder / "model.json").read_text())["card"]["init"] == {k: origin[k] for k in ("uri", "digest")}
    for step in ("tune", "train"):
        kept = params(Path(store.uri), facts[step]["mlflow_run"])
        assert {key: kept[f"init.{key}"] for key in origin} == origin
    old, new = (load_file(where / "weights.safetensors") for where in (Path(store.uri, "runs/old/train/model"), folder))
    same = {name for name in old if old[name].equal(new[name])}
    assert {name for name in old if name.startswith(("patch_embed.", "layers.0."))} <= same
    assert not {"head.weight", "layers.3.blocks.0.self_attention.out_proj.weight"} & same


@pytest.mark.slow  # a third Ray; what the file gives is tested in unit/pipelines/test_initial_weights.py
def test_a_training_starts_from_upstream_of_other_classes(tmp_path):
    export_upstream(build_model(MedMambaConfig(variant="nano", num_classes=9)), tmp_path / "nano.pth")
    arguments = ["train", *TINY, "--run", "tuned", "--store", "store", "--json", "--train.init"]
    done = medmamba(*arguments, "nano.pth", cwd=tmp_path)
    assert "new head for 3 classes: the weights do not name their classes" in done.stderr
    facts = json.loads(done.stdout)["train"]
    assert facts["init"]["uri"] == str(tmp_path / "nano.pth")
    # Asked again when the file is gone, and as the copy in the store, it is the same training.
    (tmp_path / "nano.pth").unlink()
    assert "cannot be read now" in medmamba(*arguments, "nano.pth", cwd=tmp_path).stderr
    again = medmamba(*arguments, f"weights/{facts['init']['digest']}", cwd=tmp_path)
    assert json.loads(again.stdout)["train"] == facts
    refused = medmamba(*arguments, "nano.pth", "--model.variant", "T", cwd=tmp_path, code=1)
    assert "--model.variant nano" in refused.stderr
