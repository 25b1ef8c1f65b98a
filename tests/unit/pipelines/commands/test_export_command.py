"""The command export on the trained network of a run."""

import json
import re

import numpy as np
import pytest
import torch

from data_shards.store import open_store
from medmamba.checkpoint import load_model
from medmamba.preprocess import preprocess
from pipelines.cli import main
from pipelines.flow.record import Record, write_record
from tests.registered import SIDE, facts


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with the run `mine`, whose training is finished."""
    monkeypatch.chdir(tmp_path)
    found = open_store(str(tmp_path / "store"))
    trained = facts(found, "mine", auc=0.9)["train"]
    record = Record(trained, {}, 1.0, "2026-01-01", "2026-01-01", {}, "", {})
    write_record(found.at("runs", "mine", "train"), record)
    return found


def test_a_checkpoint_for_the_papers_code_has_the_runs_name(store, tmp_path, capsys):
    assert main(["export", "--run", "mine", "--to", "upstream", "--store", "store"]) == 0
    assert "mine.pth: " in capsys.readouterr().out
    model, _, _ = load_model(tmp_path / "store" / "runs" / "mine" / "train" / "model")
    stored = torch.load(tmp_path / "mine.pth", weights_only=True)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_onnx_of_a_run_agrees_and_is_reported_as_json(store, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    assert main(["export", "--run", "mine", "--store", "store", "--out", "files/a.onnx", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["to"], told["run"]) == ("files/a.onnx", "onnx", "mine")
    assert told["size_bytes"] == (tmp_path / "files" / "a.onnx").stat().st_size
    assert max(told["differences"].values()) <= 1e-5
    images = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    found = onnxruntime.InferenceSession(told["path"]).run(None, {"images": images})[0]
    model, _, _ = load_model(tmp_path / "store" / "runs" / "mine" / "train" / "model")
    with torch.inference_mode():
        wanted = model(preprocess(torch.from_numpy(images))).softmax(1).numpy()
    assert np.abs(found - wanted).max() <= 1e-5


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 2, "export: name the run with --run"),
        (["--run", "other"], 2, "run 'other' in .* has no trained network"),
        (["--run", "mine", "--to", "tflite"], 2, "invalid choice 'tflite'"),
        (["--run", "mine", "--out", "store"], 2, "--out store is a folder"),
    ],
)
def test_what_cannot_be_exported_is_one_line(store, capsys, argv, code, said):
    assert main(["export", *argv, "--store", "store"]) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(said, line)


def test_weights_that_were_replaced_are_not_exported(store, tmp_path, capsys):
    path = tmp_path / "store" / "runs" / "mine" / "train" / "model" / "model.json"
    path.write_text(path.read_text().replace("ellipse", "ellipsis"))
    assert main(["export", "--run", "mine", "--to", "upstream", "--store", "store"]) == 1
    assert "is recorded" in capsys.readouterr().err
    assert not (tmp_path / "mine.pth").exists()
