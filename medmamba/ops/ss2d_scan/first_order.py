"""Compiled backends have one derivative: a second one raises instead of leaving terms out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gradients(backend: str, backward: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """`backward(*tensors)`, the gradients of a scan; differentiating them raises NotImplementedError.

    Without this torch takes them for constants, with a warning: a gradient penalty or a Hessian was wrong by up to 5 %.
    `torch.autograd.function.once_differentiable` is not enough: it looks at the incoming gradient alone, which does not
    require one where the loss is a sum.
    """
    with torch.no_grad():
        found = backward(*tensors)
    if not torch.is_grad_enabled():  # the usual backward pass, without create_graph
        return found
    needs_grad = next((x for x in tensors if x.requires_grad), None)
    return found if needs_grad is None else _FirstOrder.apply(backend, needs_grad, *found)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, needs_grad: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
        ctx.backend = backend
        return tuple(x.view_as(x) for x in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"scan backend {ctx.backend!r} has no second-order gradients: build the model with scan='reference' "
            "(--placement.scan reference), which has gradients of any order"
        )
