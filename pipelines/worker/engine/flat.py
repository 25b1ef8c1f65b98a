"""Joins the parameters of each optimizer group into one flat tensor, so that per-tensor work becomes per-group work.

MedMamba-T has 200 parameters in two groups. DeepSpeed's hooks, buckets, copies, norms and all-reduces run once per
tensor: 200 times per step, or twice with flat tensors. The network's own parameters are views of the flat ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

ALIGNED = 64  # elements; every parameter then starts on a cache line

Gradients = Callable[..., torch.Tensor]


class FlatParameters(nn.Module):
    """The module passed to DeepSpeed in place of the network: one parameter per group, and a forward that is the loss.

    `groups` are an optimizer's groups of the network's parameters; `flat_groups` are the same groups with flat
    parameters. `gradients` (set once by the engine) computes a micro-batch's loss and writes the gradients into
    `gradient_views`.
    """

    def __init__(self, network: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        frozen = {name: each for name, each in network.named_parameters() if not each.requires_grad}
        self._rest = {**dict(network.named_buffers()), **frozen}
        self._groups = [list(group["params"]) for group in groups]
        self.flats = nn.ParameterList(_flattened(parameters) for parameters in self._groups)
        self.flat_groups = [{**group, "params": [flat]} for group, flat in zip(groups, self.flats, strict=True)]
        self._gradients = [torch.zeros_like(flat, requires_grad=False) for flat in self.flats]
        self.gradient_views = [
            view
            for parameters, gradient in zip(self._groups, self._gradients, strict=True)
            for view in _views(gradient, parameters)
        ]
        self.gradients: Gradients | None = None
        self.point()

    @property
    def parameters_of_network(self) -> list[nn.Parameter]:
        """The network's own parameters, in the order of `gradient_views`."""
        return [parameter for parameters in self._groups for parameter in parameters]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The scalar loss; its backward pass sets the gradients of the flat parameters."""
        assert self.gradients is not None, "`gradients` must be set before the first forward pass"
        loss = self.gradients(*inputs)
        return _Delivered.apply(loss, self._gradients, *self.flats)

    @torch.no_grad()
    def split(self, flats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Splits tensors shaped like the flat parameters into views shaped like `parameters_of_network`, in order."""
        return [
            view
            for flat, parameters in zip(flats, self._groups, strict=True)
            for view in _views(flat.detach(), parameters)
        ]

    @torch.no_grad()
    def joined(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inverse of `split`, on the device of the flat parameters."""
        flats = [torch.zeros_like(flat, requires_grad=False) for flat in self.flats]
        for view, part in zip(self.split(flats), parts, strict=True):
            view.copy_(part)
        return flats

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs besides the flat parameters: the network's buffers and frozen parameters."""
        return {name: each.detach().clone() for name, each in self._rest.items()}

    @torch.no_grad()
    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restores what `get_extra_state` returned."""
        for name, each in self._rest.items():
            each.copy_(state[name])

    @torch.no_grad()
    def point(self) -> bool:
        """Makes the network's parameters views of the flat ones; returns whether any was not.

        DeepSpeed moves the flat parameters into its own buffers when it starts.
        """
        moved = False
        for flat, parameters in zip(self.flats, self._groups, strict=True):
            for parameter, view in zip(parameters, _views(flat.detach(), parameters), strict=True):
                moved |= parameter.data_ptr() != view.data_ptr()
                parameter.data = view
        return moved


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> None:
    """Scales gradients down to the global norm `clip_norm` if theirs is larger, without waiting for the device.

    Uses DeepSpeed's arithmetic of stages 1 and 2, so that stage 0 rounds the same way.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float64).square().float() for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(squares).sqrt())
    torch._foreach_mul_(gradients, ((norm + 1e-6) / clip_norm).clamp(min=1.0).reciprocal())


@torch.no_grad()
def copy_gradients(views: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
    """Copies `found` into `views`, all tensors with equal strides in one kernel; torch requires that of every pair."""
    pairs = list(zip(views, found, strict=True))
    alike = [(view, each) for view, each in pairs if view.stride() == each.stride()]
    if alike:
        torch._foreach_copy_([view for view, _ in alike], [each for _, each in alike])
    for view, each in pairs:
        if view.stride() != each.stride():
            view.copy_(each)


class _Delivered(torch.autograd.Function):
    """Returns the loss unchanged; its backward pass returns gradients that are already computed."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *flats: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        # `outer` is 1 / the number of micro-batches of a step.
        return None, None, *(gradient * outer[0] for gradient in ctx.gradients)


@torch.no_grad()
def _flattened(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    flat = parameters[0].new_zeros(sum(_taken(parameter) for parameter in parameters))
    for view, parameter in zip(_views(flat, parameters), parameters, strict=True):
        view.copy_(parameter)
    return nn.Parameter(flat)


def _views(flat: torch.Tensor, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Views of `flat` in the parameters' shapes."""
    found, start = [], 0
    for parameter in parameters:
        found.append(flat[start : start + parameter.numel()].view(parameter.shape))
        start += _taken(parameter)
    return found


def _taken(parameter: nn.Parameter) -> int:
    """Elements of the flat tensor that a parameter occupies, including padding."""
    return -(-parameter.numel() // ALIGNED) * ALIGNED
