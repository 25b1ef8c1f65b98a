"""Models on disk: bit-equal round trips, upstream's files, refusals that name the tensor."""

import json
from argparse import Namespace

import pytest
import torch

from medmamba.checkpoint import (
    MODEL,
    WEIGHTS,
    CheckpointError,
    export_upstream,
    load_model,
    load_state,
    load_upstream,
    save_model,
)
from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.model import build_model

TINY = MedMambaConfig(dims=(8, 16), depths=(1, 2), num_classes=3)
CARD = {"classes": ["a", "b", "c"], "task": "multiclass", "image_size": 32, "channels": 1}


def trained(config):
    """A network whose BatchNorm statistics have moved from their start."""
    torch.manual_seed(0)
    model = build_model(config)
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("config", [TINY, ConvNetConfig(num_classes=3, widths=(8, 16))], ids=lambda c: c.kind)
def test_a_saved_model_comes_back_bit_equal_with_config_and_card(tmp_path, config):
    model = trained(config)
    save_model(tmp_path / "model", model, config, card=CARD)
    loaded, loaded_config, card = load_model(tmp_path / "model")
    assert (loaded_config, card, loaded.training) == (config, CARD, False)
    images = torch.randn(2, 3, 40, 33)
    assert torch.equal(loaded(images), model(images))


def test_the_same_model_gives_the_same_bytes_and_only_the_two_files(tmp_path):
    model = trained(TINY)
    for name in ("one", "two"):
        save_model(tmp_path / name, model, TINY, card=CARD)
    save_model(tmp_path / "two", model, TINY, card=CARD)
    for file in (WEIGHTS, MODEL):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert {path.name for path in (tmp_path / "two").iterdir()} == {WEIGHTS, MODEL}


def test_weights_are_stored_in_float32_whatever_they_were(tmp_path):
    save_model(tmp_path, trained(TINY).bfloat16(), TINY, card=CARD)
    state = load_model(tmp_path)[0].state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def renamed(rename):
    return lambda state: {rename(name): value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda s: {"model": s},
        lambda s: {"epoch": 3, "best": 0.9, "model_state_dict": s},
        renamed("module.{}".format),
        renamed("_orig_mod.{}".format),
        renamed("_orig_mod.module.{}".format),
        renamed("module._orig_mod.{}".format),
        renamed(lambda name: name.replace("blocks.0.", "blocks.0._orig_mod.")),
        lambda s: {"state_dict": renamed("net.{}".format)(s)},
    ],
    ids=[
        "bare",
        "model",
        "script",
        "parallel",
        "compiled",
        "both",
        "both, other order",
        "compiled blocks",
        "lightning",
    ],
)
def test_an_upstream_checkpoint_goes_out_and_comes_back_with_the_config_its_shapes_tell(tmp_path, wrap):
    model = trained(TINY)
    export_upstream(model, tmp_path / "net.pth")
    torch.save(wrap(torch.load(tmp_path / "net.pth", weights_only=True)), tmp_path / "wrapped.pth")
    state, config = load_upstream(tmp_path / "wrapped.pth")
    assert config == TINY
    again = build_model(config).eval()
    load_state(again, state, where="net.pth")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))


def test_an_upstream_checkpoint_may_be_a_safetensors_file(tmp_path):
    save_model(tmp_path, trained(TINY), TINY, card=CARD)
    assert load_upstream(tmp_path / WEIGHTS)[1] == TINY


def test_two_networks_in_one_state_dict_are_refused():
    state = build_model(TINY).state_dict()
    both = {**state, **{f"module.{name}": value for name, value in state.items()}}
    with pytest.raises(CheckpointError, match=r"two tensors are 'patch_embed.proj.weight'.*one network"):
        load_upstream(both)


def old_format(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, old_format])
@pytest.mark.parametrize("kept", [0, 1, 50, 0.5, 0.9])
def test_a_truncated_checkpoint_is_refused_in_one_sentence(tmp_path, save, kept):
    path = tmp_path / "net.pth"
    save(trained(TINY).state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"^\S*net\.pth: cannot be read as tensors.*get it again$"):
        load_upstream(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [(lambda net: net, "MedMamba"), (lambda net: {"model": net.state_dict(), "args": Namespace(lr=1)}, "Namespace")],
    ids=["the network itself", "arguments beside the weights"],
)
def test_python_objects_in_a_checkpoint_are_named_and_not_loaded(tmp_path, content, named):
    torch.save(content(build_model(TINY, scan="reference")), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=rf"Python objects \(.*{named}.*state_dict"):
        load_upstream(tmp_path / "net.pth")


@pytest.mark.parametrize("variant", ["T", "S", "B", "nano"])
def test_the_variant_is_recognised_from_the_shapes(variant):
    config = MedMambaConfig(variant=variant, num_classes=7)
    with torch.device("meta"):
        state = build_model(config, device="meta").state_dict()
    assert load_upstream(state)[1] == config


@pytest.mark.parametrize("branches", ["conv", "scan"])
def test_an_ablation_is_recognised_from_the_shapes(branches):
    config = TINY.model_copy(update={"branches": branches})
    assert load_upstream(build_model(config).state_dict())[1] == config


def test_a_checkpoint_of_another_architecture_is_refused_naming_tensor_and_shapes(tmp_path):
    save_model(tmp_path, trained(TINY), TINY, card=CARD)
    other = TINY.model_copy(update={"num_classes": 5})
    (tmp_path / MODEL).write_text(json.dumps({"config": other.model_dump(mode="json"), "card": CARD}))
    with pytest.raises(CheckpointError, match=r"'head.weight' is of shape \(3, 16\) in it and of shape \(5, 16\)"):
        load_model(tmp_path)


def test_a_missing_and_an_unknown_tensor_are_each_named():
    model = build_model(TINY)
    state = dict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"'stranger' is of shape \(1,\) in it and missing in the model"):
        load_state(model, {**state, "stranger": torch.zeros(1)}, where="x")
    del state["head.bias"]
    with pytest.raises(CheckpointError, match=r"'head.bias' is missing in it and of shape \(3,\) in the model"):
        load_state(model, state, where="x")


def test_what_is_no_medmamba_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a MedMamba checkpoint"):
        load_upstream({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="not a state dict"):
        load_upstream({"epoch": 3})
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pth: cannot be read as tensors"):
        load_upstream(tmp_path / "text.pth")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"head.weight": tmp_path}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        load_upstream(tmp_path / "net.pth")


@pytest.mark.parametrize("damage", ["no folder", "torn weights", "torn json"])
def test_a_damaged_model_is_refused_with_a_remedy(tmp_path, damage):
    save_model(tmp_path / "m", trained(TINY), TINY, card=CARD)
    file = tmp_path / "m" / (MODEL if damage == "torn json" else WEIGHTS)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a model"):
        load_model(tmp_path / ("nowhere" if damage == "no folder" else "m"))
