"""Which parameters decay, and the learning rate of every step."""

import itertools
import math
import re

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.model import build_model
from medmamba.optim import OptimConfig, build_optimizer, layer_depths, learning_rate, parameter_groups

# Of upstream's names: everything the optimiser may shrink. Written out, so that a renamed layer is noticed.
DECAYED = re.compile(
    r"patch_embed\.proj\.weight|head\.weight|layers\.\d\.downsample\.reduction\.weight"
    r"|layers\.\d\.blocks\.\d+\."
    r"(self_attention\.(in_proj\.weight|conv2d\.weight|x_proj_weight|dt_projs_weight|out_proj\.weight)"
    r"|conv33conv33conv11\.[147]\.weight)"
)


def named_groups(model) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(model, OptimConfig())}


def test_only_projections_and_convolutions_of_medmamba_decay():
    model = build_model(MedMambaConfig(variant="nano", num_classes=3))
    groups = named_groups(model)
    everything = {name for name, _ in model.named_parameters()}
    assert groups["decay"] == {name for name in everything if DECAYED.fullmatch(name)}
    assert groups["no_decay"] == everything - groups["decay"]
    assert any(name.endswith("A_logs") for name in groups["no_decay"])


def test_each_convnet_parameter_has_one_group_and_norms_no_decay():
    model = build_model(ConvNetConfig(num_classes=3))
    groups = named_groups(model)
    assert groups["decay"] | groups["no_decay"] == {name for name, _ in model.named_parameters()}
    parameters = dict(model.named_parameters())
    assert all(parameters[name].ndim >= 2 for name in groups["decay"])
    assert all(parameters[name].ndim == 1 for name in groups["no_decay"])


def test_a_frozen_parameter_is_in_no_group():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert named_groups(model) == {"no_decay": {"bias"}}  # DeepSpeed flattens each group: an empty one breaks it


def test_the_optimiser_decays_what_it_should_and_nothing_else():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimConfig(lr=0.1, weight_decay=1.0)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.9 if name == "0.weight" else 1.0))


def rate_scales(model, decay: float) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(layer_decay=decay))
    assert len({group["name"] for group in groups}) == len(groups)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def test_medmamba_blocks_learn_at_decayed_rates_below_the_head():
    model = build_model(MedMambaConfig(dims=(4, 8, 16), depths=(2, 1, 2), num_classes=3))
    found = rate_scales(model, 0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    beginnings = {  # five blocks, so the stem is six steps below the head
        "patch_embed.": 6, "layers.0.blocks.0.": 5, "layers.0.blocks.1.": 4, "layers.0.downsample.": 4,
        "layers.1.blocks.0.": 3, "layers.1.downsample.": 3, "layers.2.blocks.0.": 2, "layers.2.blocks.1.": 1,
        "head.": 0,
    }  # fmt: skip
    for name, scale in found.items():
        (below,) = (below for start, below in beginnings.items() if name.startswith(start))
        assert scale == 0.5**below, name


def test_convnet_layer_decay_counts_blocks_and_the_last_norm():
    depths = layer_depths(build_model(ConvNetConfig(num_classes=3, widths=(4, 8), blocks=2)))
    wanted = {"stem": 0, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "blocks.3": 4, "norm": 5, "head": 5}
    for name, depth in depths.items():
        assert depth == next(found for start, found in wanted.items() if name.startswith(f"{start}.")), name


def test_layer_decay_keeps_weight_decay_and_one_adds_no_group():
    model = build_model(MedMambaConfig(num_classes=3))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in parameter_groups(model, OptimConfig(layer_decay=0.7, weight_decay=0.3)):
        wanted = {0.3 if DECAYED.fullmatch(names[id(p)]) else 0.0 for p in group["params"]}
        assert wanted == {group["weight_decay"]}
    assert [(g["name"], g["lr_scale"]) for g in parameter_groups(model, OptimConfig())] == [
        ("decay", 1),
        ("no_decay", 1),
    ]


def rates(config: OptimConfig, *, steps_per_epoch: int, epochs: int) -> list[float]:
    return [
        learning_rate(config, step=step, steps_per_epoch=steps_per_epoch, epochs=epochs)
        for step in range(steps_per_epoch * epochs)
    ]


def test_warm_up_is_linear_and_meets_the_cosine_at_its_top():
    config = OptimConfig(lr=1.0, warmup_epochs=2, schedule="cosine", final_lr_fraction=0.1)
    got = rates(config, steps_per_epoch=5, epochs=10)
    assert got[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert got[10] == pytest.approx(1.0)
    assert got[-1] == pytest.approx(0.1)
    assert got[25] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 15 / 39)) / 2)
    assert all(later < earlier for earlier, later in itertools.pairwise(got[10:]))


def test_warm_up_of_a_part_of_an_epoch_never_passes_the_peak():
    got = rates(OptimConfig(lr=1.0, warmup_epochs=0.5), steps_per_epoch=5, epochs=2)
    assert max(got) == 1.0
    assert got[0] == pytest.approx(0.4)


def test_the_papers_schedule_divides_by_ten_at_epochs_50_and_75():
    got = rates(OptimConfig(lr=1e-3, schedule="step"), steps_per_epoch=2, epochs=100)
    assert [got[epoch * 2] for epoch in (0, 49, 50, 74, 75, 99)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_a_constant_rate_stays():
    assert set(rates(OptimConfig(lr=1e-4, schedule="constant"), steps_per_epoch=3, epochs=4)) == {1e-4}


def test_a_run_of_a_single_step_has_a_rate():
    assert rates(OptimConfig(lr=1.0), steps_per_epoch=1, epochs=1) == [1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0}, {"lr": -1e-3}, {"weight_decay": -1}, {"schedule": "linear"}, {"lrr": 1}, {"betas": (0.9, 2)},
        {"betas": (-0.1, 0.9)}, {"betas": (0.9, 1.0)}, {"milestones": (-3,)}, {"milestones": (50, 0)},
        {"layer_decay": 0}, {"layer_decay": 1.1},
    ],
)  # fmt: skip
def test_fields_out_of_range_and_unknown_fields_are_refused(wrong):
    with pytest.raises(ValidationError):
        OptimConfig(**wrong)
