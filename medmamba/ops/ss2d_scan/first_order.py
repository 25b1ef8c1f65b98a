"""Compiled backends only have first derivatives; second derivatives raise instead of being silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gradients(backend: str, backward: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns `backward(*tensors)`, the gradients of a scan; differentiating them raises NotImplementedError.

    Otherwise torch would treat them as constants with only a warning: a gradient penalty or a Hessian was wrong by up
    to 5 %. `torch.autograd.function.once_differentiable` is not sufficient: it only checks whether the incoming
    gradient requires a gradient, which it does not if the loss is a sum.
    """
    with torch.no_grad():
        found = backward(*tensors)
    if not torch.is_grad_enabled():  # the usual backward pass, without create_graph
        return found
    needs_grad = next((x for x in tensors if x.requires_grad), None)
    if needs_grad is None:
        return found
    guarded: tuple[Tensor, ...] = _FirstOrder.apply(backend, needs_grad, *found)  # type: ignore[no-untyped-call]
    return guarded


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, needs_grad: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
        ctx.backend = backend
        return tuple(x.view_as(x) for x in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"scan backend {ctx.backend!r} does not support second-order gradients: build the model with "
            "scan='reference' (--placement.scan reference), which supports any order"
        )
