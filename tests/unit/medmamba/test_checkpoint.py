"""Models on disk: bit-equal round trips, upstream's files, refusals that name the tensor."""

import enum
import functools
import json
import resource
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from medmamba.checkpoint import (
    MODEL,
    WEIGHTS,
    CheckpointError,
    export_upstream,
    load_model,
    load_state,
    load_upstream,
    model_digest,
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


def test_an_equal_model_gives_equal_bytes_in_just_two_files(tmp_path):
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
def test_an_upstream_checkpoint_round_trips_with_its_config(tmp_path, wrap):
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
    with pytest.raises(CheckpointError, match=r"two tensors are called 'patch_embed.proj.weight'.*single network"):
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
    with pytest.raises(CheckpointError, match=r"^\S*net\.pth: cannot be read as tensors.*download it again$"):
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


def test_another_architecture_is_refused_with_tensor_and_shapes(tmp_path):
    save_model(tmp_path, trained(TINY), TINY, card=CARD)
    other = TINY.model_copy(update={"num_classes": 5})
    (tmp_path / MODEL).write_text(json.dumps({"format": 1, "config": other.model_dump(mode="json"), "card": CARD}))
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


def edited(folder, **changes):
    """A saved model whose model.json has other values: `card__x` inside the card, `config__x` inside the config."""
    for name, data in saved().items():
        (folder / name).write_bytes(data)
    stored = json.loads((folder / MODEL).read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = stored[parents[0]] if parents else stored
        if value is MISSING:
            del place[last]
        else:
            place[last] = value
    (folder / MODEL).write_text(json.dumps(stored))


@functools.cache
def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), build_model(TINY), TINY, card=CARD)
        return {name: (Path(folder) / name).read_bytes() for name in (WEIGHTS, MODEL)}


MISSING = enum.Enum("Missing", "KEY").KEY  # in the ids of tests, which have to be the same in each process


@pytest.mark.parametrize("value", [99, 0, 2, "1", None, True, 1.5, [1], "\x1b[2J", MISSING], ids=repr)
def test_another_format_is_refused_with_what_to_do(tmp_path, value):
    edited(tmp_path, format=value)
    with pytest.raises(CheckpointError, match=r"has format .*only reads format 1; use the version") as refused:
        load_model(tmp_path)
    assert str(refused.value).isprintable()


CARD_FAULTS = [
    *({f"card__{name}": MISSING} for name in CARD),
    {"card__classes": []}, {"card__classes": "abc"}, {"card__classes": [1, 2, 3]}, {"card__classes": ["a", "b"]},
    {"card__classes": ["a", "a", "b"]}, {"card__classes": ["", "a", "b"]}, {"card__classes": ["a", "b", "c", "d"]},
    {"card__task": "regression"}, {"card__task": None}, {"card__channels": 2}, {"card__channels": "1"},
    {"card__image_size": 0}, {"card__image_size": -32}, {"card__image_size": 10**9},
    {"card__image_size": "64"}, {"card__image_size": 64.5}, {"card__image_size": [64]},
    {"card__image_size": [64, 10**9]}, {"card__max_side": 0}, {"card__max_side": "big"},
    {"card": {}}, {"card": []}, {"card": None}, {"card": MISSING}, {"extra": 1},
]  # fmt: skip


@pytest.mark.parametrize("changes", CARD_FAULTS, ids=str)
def test_a_card_with_missing_or_wrong_keys_is_refused(tmp_path, changes):
    edited(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"; (the card|a model|each class|.*outputs|save it)|one for each class"):
        load_model(tmp_path)


def test_a_card_that_could_not_be_read_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"image_size.*Field required"):
        save_model(tmp_path, trained(TINY), TINY, card={"classes": ["a", "b", "c"], "task": "ordinal", "channels": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"config__dims": [10**9, 2 * 10**9]}, {"config__depths": [10**9, 1]}, {"config__d_state": 10**9},
        {"config__num_classes": 10**9}, {"config__num_classes": 0}, {"config__dims": [4096, 8192]},
        {"config__dims": [8] * 100}, {"config__depths": [256, 256]}, {"config__kind": "vit"}, {"config": None},
        {"config": {"kind": "convnet", "num_classes": 3, "widths": [10**9]}},
        {"config": {"kind": "convnet", "num_classes": 3, "widths": [8192] * 8, "blocks": 10**6}},
        {"config__drop_path": float("nan")}, {"config__unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_unlike_its_file_takes_no_memory(tmp_path, changes):
    edited(tmp_path, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        load_model(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("text", ["[]", "7", "null", '"x"', "{", "", "[" * 200_000, "\ud800", '{"format": 1}'], ids=len)
def test_what_is_no_json_object_is_no_model(tmp_path, text):
    edited(tmp_path)
    (tmp_path / MODEL).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    edited(tmp_path)
    state = load(saved()[WEIGHTS])
    state["head.weight"][0, 0] = value
    (tmp_path / WEIGHTS).write_bytes(save(state))
    with pytest.raises(CheckpointError, match=r"'head\.weight' has non-finite values"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.complex64])
def test_weights_of_another_type_are_refused(tmp_path, kind):
    edited(tmp_path)
    state = load(saved()[WEIGHTS])
    state["head.bias"] = state["head.bias"].to(kind)
    (tmp_path / WEIGHTS).write_bytes(save({name: value.contiguous() for name, value in state.items()}))
    with pytest.raises(CheckpointError, match=rf"'head\.bias' is {kind}"):
        load_model(tmp_path)


def test_a_digest_on_record_is_that_of_the_bytes_that_are_used(tmp_path):
    edited(tmp_path)
    digest = model_digest((tmp_path / WEIGHTS).read_bytes(), (tmp_path / MODEL).read_bytes())
    assert load_model(tmp_path, digest=digest)[2] == CARD
    state = load(saved()[WEIGHTS])
    state["head.bias"] += 1
    (tmp_path / WEIGHTS).write_bytes(save(state))
    with pytest.raises(CheckpointError, match=rf"{digest[:12]} is recorded: one or both were replaced"):
        load_model(tmp_path, digest=digest)
    load_model(tmp_path)
