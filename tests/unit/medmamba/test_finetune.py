"""What a fresh model takes from weights: all but a head of other classes; and what a freeze leaves alone."""

import re

import pytest
import torch

from medmamba.checkpoint import CheckpointError
from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.finetune import (
    HEAD,
    FrozenNorm,
    check_frozen,
    choose_head,
    freeze,
    network_difference,
    parameter_names,
    start_from,
)
from medmamba.model import build_model

CARD = {"classes": ["a", "b", "c"], "task": "multiclass"}
SMALL = MedMambaConfig(dims=(8, 16), depths=(1, 1), num_classes=3)


def network(seed: int, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(SMALL.model_copy(update=changes))


def taken(old, new, head) -> dict[str, torch.Tensor]:
    start_from(new, old.state_dict(), head, where="here")
    return new.state_dict()


def test_with_the_same_classes_every_tensor_is_taken():
    old, head = network(0), choose_head(CARD, ["a", "b", "c"], "ordinal")
    assert (head.is_new, head.reason) == (False, "head kept: the same 3 classes")
    found = taken(old, network(1), head)
    assert all(torch.equal(found[name], value) for name, value in old.state_dict().items())


def test_classes_in_another_order_keep_their_own_row_of_the_head():
    old, head = network(0).eval(), choose_head(CARD, ["c", "a", "b"], "multiclass")
    assert "reordered" in head.reason
    new = network(1).eval()
    taken(old, new, head)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(new(images), old(images)[:, [2, 0, 1]])


@pytest.mark.parametrize(
    ("card", "classes", "task", "reason"),
    [
        (CARD, ["a", "b"], "multiclass", "have other classes (a, b, c)"),
        (CARD, ["a", "b", "d"], "multiclass", "have other classes (a, b, c)"),
        (CARD, ["a", "b", "c", "d"], "multiclass", "new head for 4 classes"),
        ({}, ["a", "b", "c"], "multiclass", "do not name their classes"),
        (CARD, ["a", "b", "c"], "multilabel", "task multiclass, the data is multilabel"),
    ],
    ids=["fewer", "one other", "more", "no names though as many", "another task"],
)
def test_only_a_head_of_other_classes_is_new(card, classes, task, reason):
    head = choose_head(card, classes, task)
    assert head.is_new
    assert reason in head.reason
    old, new = network(0), network(1, num_classes=len(classes))
    fresh = {name: new.state_dict()[name].clone() for name in HEAD}
    found = taken(old, new, head)
    assert all(torch.equal(found[name], fresh[name]) for name in HEAD)
    assert all(torch.equal(found[name], value) for name, value in old.state_dict().items() if name not in HEAD)


def test_weights_of_another_network_are_refused_on_loading():
    with pytest.raises(CheckpointError, match="here: the checkpoint has another architecture"):
        start_from(
            network(0), network(0, depths=(1, 2)).state_dict(), choose_head({}, ["a"], "multiclass"), where="here"
        )


@pytest.mark.parametrize(
    ("weights", "wanted", "told"),
    [
        (MedMambaConfig(variant="T"), MedMambaConfig(), "use --model.variant T, or other weights"),
        (MedMambaConfig(d_state=8), MedMambaConfig(), "d_state 8 and not 16; use --model.d-state 8"),
        (MedMambaConfig(branches="conv"), MedMambaConfig(), "use --model.branches conv"),
        (SMALL, MedMambaConfig(), "use --model.dims 8 16 --model.depths 1 1"),
        (MedMambaConfig(variant="T"), SMALL, "use --model.dims 96 192 384 768 --model.depths 2 2 4 2"),
        (ConvNetConfig(), MedMambaConfig(), "use --model.kind convnet"),
        (ConvNetConfig(blocks=2), ConvNetConfig(), "blocks 2 and not 1; use --model.blocks 2"),
    ],
    ids=["variant", "states", "branches", "own sizes", "variant over own sizes", "kind", "convnet"],
)
def test_another_network_is_told_with_the_options_that_give_it(weights, wanted, told):
    assert told in network_difference(weights, wanted)


def test_drop_path_and_class_count_make_no_other_network():
    weights = MedMambaConfig(variant="T", num_classes=1000, drop_path=0.3)
    sizes = {"dims": (96, 192, 384, 768), "depths": (2, 2, 4, 2)}
    assert network_difference(weights, MedMambaConfig(variant="T")) == ""
    assert network_difference(weights, MedMambaConfig(**sizes)) == ""


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["patch_embd.*"], "'patch_embd.*' does not match the name of any parameter"),
        (["patch_embed"], "did you mean patch_embed.*"),
        (["layers.0.*", "layers.9.*"], "'layers.9.*' does not match the name of any parameter"),
        (["*"], "freezes all 59 parameters and leaves nothing to train"),
        (["layers.*", "patch*", "head.?*"], "leaves nothing to train; keep at least the head trainable"),
    ],
)
def test_a_freeze_that_does_nothing_or_leaves_nothing_is_refused(patterns, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        check_frozen(parameter_names(SMALL), patterns)
    with pytest.raises(ValueError, match=re.escape(told)):
        freeze(network(0), patterns)


def test_the_hint_for_a_misspelled_pattern_is_one_that_matches():
    names = parameter_names(SMALL)
    with pytest.raises(ValueError) as error:
        check_frozen(names, ["layer.0.block.*"])
    hints = re.search(r"did you mean (.*)\?", str(error.value)).group(1).split(", ")
    assert all(check_frozen(names, [hint]) for hint in hints)


def test_frozen_parts_get_no_gradient_and_keep_their_statistics():
    model = network(0)
    before = list(model.state_dict())
    freeze(model, ["patch_embed.*", "layers.0.*"])
    assert list(model.state_dict()) == before
    model.train()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.rand(2, 3, 32, 32) + 3).sum().backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("patch_embed.", "layers.0."))
        assert parameter.requires_grad is not frozen
        assert (parameter.grad is None) is frozen, name
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    assert moved
    assert all(re.fullmatch(r"layers\.1\..*(running_mean|running_var|num_batches_tracked)", name) for name in moved)
    norms = [m for m in model.modules() if isinstance(m, FrozenNorm)]
    assert len(norms) == 3
    assert not any(norm.training for norm in norms)


def test_a_partly_frozen_batchnorm_still_follows_the_data():
    model = network(0)
    freeze(model, ["*.conv33conv33conv11.0.weight"])
    assert not any(isinstance(m, FrozenNorm) for m in model.modules())


@pytest.mark.parametrize("pattern", ["*.A_logs", "*.Ds", "*.dt_projs_*", "*.x_proj_weight"])
def test_single_parameters_of_the_scan_can_be_frozen(pattern):
    model = network(0)
    freeze(model, [pattern])
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all((p.grad is not None) is p.requires_grad for p in model.parameters())
