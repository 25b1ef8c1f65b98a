"""Exported networks in their own runtimes against the network itself."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from medmamba import export
from medmamba.checkpoint import load_upstream
from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.export import ExportError, to_onnx, to_torch_export, to_upstream
from medmamba.loss import scores
from medmamba.model import build_model
from medmamba.ops.ss2d_scan import loop, reference
from medmamba.preprocess import preprocess

SMALL = MedMambaConfig(num_classes=4, dims=(8, 16), depths=(1, 1), d_state=5)
CASES = {
    "nano, 64 px": (MedMambaConfig(num_classes=4), "multiclass", 64, 3),
    "multilabel, gray, not square": (SMALL, "multilabel", [36, 44], 1),
    "convnet": (ConvNetConfig(num_classes=4, widths=(8, 16)), "ordinal", 32, 3),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """All tests of this file."""


def network(config) -> torch.nn.Module:
    """Random weights whose probabilities differ by far more than the tolerance from image to image."""
    torch.manual_seed(1)
    model = build_model(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(60)
    return model


def card_of(task: str, size, channels: int) -> dict:
    return {"classes": ["a", "b", "c", "d"], "task": task, "image_size": size, "channels": channels}


def images(card: dict, batch: int) -> np.ndarray:
    size = card["image_size"]
    sides = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(batch).integers(0, 256, (batch, *sides, card["channels"]), dtype=np.uint8)


def probabilities(model: torch.nn.Module, card: dict, images_BHWC: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return scores(model(preprocess(torch.from_numpy(images_BHWC))), card["task"]).numpy()


def check_agreement(model, card, run, batches=(1, 5, 8)) -> None:
    for batch in batches:
        shown = images(card, batch)
        wanted = probabilities(model, card, shown)
        assert np.abs(run(shown) - wanted).max() <= 1e-5
    assert wanted.std(0).max() > 1e-3  # another image has another result, so agreement says something


def test_the_loop_computes_what_the_reference_does():
    draw = torch.Generator().manual_seed(0)
    batch, height, width, channels, rank, states = 2, 5, 3, 6, 2, 4
    shapes = (
        (batch, height, width, channels), (batch, height, width, 4, rank), (batch, height, width, 4, states),
        (batch, height, width, 4, states), (4, channels, rank), (4, channels), (4, channels, states), (4, channels),
    )  # fmt: skip
    operands = [torch.randn(shape, generator=draw) for shape in shapes]
    with torch.no_grad():
        torch.testing.assert_close(loop.scan(*operands), reference.scan(*operands), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_onnx_gives_the_probabilities_of_the_network(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    config, *described = case
    model, card = network(config), card_of(*described)
    written = to_onnx(model, card, tmp_path / "new" / "net.onnx")
    assert written.size_bytes == written.path.stat().st_size
    assert set(written.differences) == {1, 5}
    assert [path.name for path in written.path.parent.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    check_agreement(model, card, lambda shown: session.run(["probabilities"], {"images": shown})[0])
    kept = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(kept[key]) for key in card} == card
    assert session.get_inputs()[0].type == "tensor(uint8)"


def test_the_scan_is_a_loop_in_onnx_for_any_image_size(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    written = to_onnx(network(SMALL), card_of("multiclass", 48, 3), tmp_path / "net.onnx")
    graph = onnx.load(written.path).graph
    assert sum(node.op_type == "Scan" for node in graph.node) == 2  # one for each block
    assert len(graph.node) < 600  # 12 x 12 positions alone would be thousands


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_torch_export_program_gives_equal_probabilities(case, tmp_path):
    config, *described = case
    model, card = network(config), card_of(*described)
    written = to_torch_export(model, card, tmp_path / "net.pt2")
    extra = {"card.json": ""}
    program = torch.export.load(written.path, extra_files=extra).module()
    with torch.no_grad():
        check_agreement(model, card, lambda shown: program(torch.from_numpy(shown)).numpy())
    assert json.loads(extra["card.json"]) == card


def test_a_torch_export_program_runs_without_this_project(tmp_path):
    model, card = network(SMALL), card_of("multiclass", 32, 3)
    written = to_torch_export(model, card, tmp_path / "net.pt2")
    shown = images(card, 3)
    np.save(tmp_path / "images.npy", shown)
    code = (
        "import sys, numpy, torch\n"
        "program = torch.export.load('net.pt2').module()\n"
        "found = program(torch.from_numpy(numpy.load('images.npy')))\n"
        "numpy.save('found.npy', found.detach().numpy())\n"
        "assert not [name for name in sys.modules if name.startswith('medmamba')]\n"
    )
    assert written.path == tmp_path / "net.pt2"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "found.npy") - probabilities(model, card, shown)).max() <= 1e-5


def test_upstreams_code_finds_its_own_names_and_the_same_tensors(tmp_path):
    model = network(MedMambaConfig(num_classes=4))
    written = to_upstream(model, tmp_path / "net.pth")
    stored = torch.load(written.path, weights_only=True)
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert load_upstream(written.path)[1].variant == "nano"
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ConvNetConfig(num_classes=4), "no MedMamba"),
        (MedMambaConfig(num_classes=4, branches="conv"), "branches 'conv'"),
    ],
    ids=["convnet", "one branch"],
)
def test_a_network_unknown_to_the_paper_has_no_upstream_file(config, said, tmp_path):
    with pytest.raises(ExportError, match=said):
        to_upstream(network(config), tmp_path / "net.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_agree_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    (tmp_path / "net.pt2").write_text("an earlier one")
    with pytest.raises(ExportError, match="it was not kept"):
        to_torch_export(network(CASES["convnet"][0]), card_of("multiclass", 32, 3), tmp_path / "net.pt2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]


def test_a_model_in_training_mode_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"call model\.eval"):
        to_torch_export(network(SMALL).train(), card_of("multiclass", 32, 3), tmp_path / "net.pt2")


@pytest.mark.slow
@pytest.mark.parametrize(("write", "name"), [(to_onnx, "net.onnx"), (to_torch_export, "net.pt2")])
def test_the_smallest_network_of_the_paper_is_exported(write, name, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    model = network(MedMambaConfig(variant="T", num_classes=4))
    written = write(model, card_of("multiclass", 224, 3), tmp_path / name)
    assert max(written.differences.values()) <= 1e-5
    assert written.size_bytes < 70e6
