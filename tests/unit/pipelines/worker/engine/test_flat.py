"""One flat parameter per optimizer group: the same numbers, the same gradients, in fewer pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medmamba.optim import OptimConfig, build_optimizer, parameter_groups
from pipelines.worker.engine.flat import ALIGNED, FlatParameters, clip_gradients, copy_gradients


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def flattened(model: nn.Module) -> FlatParameters:
    flat = FlatParameters(model, parameter_groups(model, OptimConfig()))

    def gradients(inputs: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            loss = model(inputs).square().mean()
            found = torch.autograd.grad(loss, flat.parameters_of_network)
        torch._foreach_copy_(flat.gradient_views, found)
        return loss.detach()

    flat.gradients = gradients
    return flat


def test_the_network_computes_with_the_flat_parameters():
    model, whole = network(), network()
    flat = flattened(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name))
        assert parameter.storage_offset() % ALIGNED == 0
    with torch.no_grad():
        for each in flat.flats:
            each.zero_()
    assert all(not parameter.any() for parameter in model.parameters())


def test_a_step_is_that_of_the_network_alone():
    """Adam's first step is nearly the sign of each gradient: a gradient at the wrong place would show."""
    model, alone, inputs = network(), network(), torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    flat, config = flattened(model), OptimConfig(lr=0.1)
    for loss, parameters, groups in (
        (flat(inputs), flat.flats, flat.flat_groups),
        (alone(inputs).square().mean(), list(alone.parameters()), parameter_groups(alone, config)),
    ):
        optimizer = build_optimizer(groups, config)
        loss.backward()
        clip_gradients(parameters, 0.01)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, alone.get_parameter(name), rtol=1e-6, atol=1e-6)


def test_gradients_accumulate_over_micro_batches():
    model, inputs = network(), torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    flat = flattened(model)
    for part in inputs.chunk(2):
        (flat(part) / 2).backward()
    both = [each.grad.clone() for each in flat.flats]
    for each in flat.flats:
        each.grad = None
    parts = [torch.autograd.grad(model(part).square().mean(), flat.parameters_of_network) for part in inputs.chunk(2)]
    torch._foreach_copy_(flat.gradient_views, [(a + b) / 2 for a, b in zip(*parts, strict=True)])
    for found, expected in zip(both, flat._gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_parameters_that_deepspeed_moved_are_found_again():
    model = network()
    flat = flattened(model)
    assert not flat.point()
    with torch.no_grad():
        for each in flat.flats:
            each.data = each.data.clone() + 1
    assert flat.point()
    assert torch.equal(model[0].bias, network()[0].bias + 1)


def test_a_checkpoint_holds_the_buffers_too():
    model, other = network(), network()
    flat, again = flattened(model), flattened(other)
    model(torch.randn(16, 5))
    again.load_state_dict(flat.state_dict())
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    assert model[1].running_mean.any()
    assert int(other[1].num_batches_tracked) == 1


def test_a_checkpoint_holds_frozen_parameters_too():
    """A training that resumes is not given the weights it began with again."""
    model, other = network(), network()
    for each in (model, other):
        each[0].requires_grad_(False)
    with torch.no_grad():
        other[0].weight.zero_()
    again = flattened(other)
    again.load_state_dict(flattened(model).state_dict())
    assert torch.equal(other[0].weight, model[0].weight)
    assert not other[0].weight.requires_grad


@pytest.mark.parametrize(("size", "scale"), [(3.0, 1.0), (0.5, 3.0), (0.5, 100.0)])
def test_only_gradients_longer_than_the_norm_are_clipped(size, scale):
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, scale)
    clip_gradients(parameters, size)
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in parameters))
    assert norm == pytest.approx(min(size, scale * math.sqrt(8)), rel=1e-5)


def test_gradients_that_lie_otherwise_in_memory_are_copied_too():
    """Those of convolutions come with the channels last; torch then copies every tensor of a list alone."""
    found = [torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last), torch.randn(5), torch.randn(2, 3)]
    views = [torch.zeros(each.shape) for each in found]
    copy_gradients(views, found)
    assert all(map(torch.equal, views, found))
