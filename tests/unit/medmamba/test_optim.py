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
from medmamba.optim import OptimConfig, build_optimizer, learning_rate, parameter_groups

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


def test_every_parameter_of_the_convnet_is_in_one_group_and_no_norm_decays():
    model = build_model(ConvNetConfig(num_classes=3))
    groups = named_groups(model)
    assert groups["decay"] | groups["no_decay"] == {name for name, _ in model.named_parameters()}
    parameters = dict(model.named_parameters())
    assert all(parameters[name].ndim >= 2 for name in groups["decay"])
    assert all(parameters[name].ndim == 1 for name in groups["no_decay"])


def test_a_frozen_parameter_is_in_no_group():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert named_groups(model) == {"decay": set(), "no_decay": {"bias"}}


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
    ],
)  # fmt: skip
def test_fields_out_of_range_and_unknown_fields_are_refused(wrong):
    with pytest.raises(ValidationError):
        OptimConfig(**wrong)
