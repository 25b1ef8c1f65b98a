"""Registers a backend's compiled scan as a torch operator, with its shapes and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from medmamba.ops.ss2d_scan.first_order import gradients

INPUTS = ("u", "dt", "b", "c", "weight", "bias", "a", "skip")  # in the order of Operands


def register(
    operator: str,
    *,
    backend: str,
    device: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    shapes: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[str] = INPUTS,
    keeps: bool = True,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers medmamba::<operator> and its backward pass with torch; returns the operator.

    Args:
        operator: Its name.
        backend: Its backend's name, for the error about second-order gradients.
        device: The device type that it runs on.
        forward: `forward(*inputs, keep)` returns y and what the backward pass needs, which is empty unless `keep`.
        shapes: The same for tensors without data.
        backward: `backward(dy, *inputs, kept)` returns the gradients of the inputs, in their order and shapes.
        inputs: The names of the inputs.
        keeps: Whether `forward` and `shapes` take `keep`; otherwise they always keep what is needed.
    """
    # Not torch.library.custom_op: it imports torch._dynamo at the first call, which takes 1.4 s in every process.
    name, named = f"medmamba::{operator}", ", ".join(f"Tensor {each}" for each in inputs)
    torch.library.define(name, f"({named}{', bool keep' if keeps else ''}) -> (Tensor, Tensor)")
    gives = ", ".join(["Tensor"] * len(inputs))
    torch.library.define(f"{name}_backward", f"(Tensor dy, {named}, Tensor kept) -> ({gives})")
    torch.library.impl(name, device, forward)
    torch.library.impl(f"{name}_backward", device, backward)
    torch.library.register_fake(name, shapes)
    torch.library.register_fake(f"{name}_backward", _shapes_of_gradients)
    run_backward = getattr(torch.ops.medmamba, f"{operator}_backward").default

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*(inputs[:-1] if keeps else inputs), output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        found = gradients(backend, run_backward, dy, *ctx.saved_tensors)
        return (*found, None) if keeps else found

    torch.library.register_autograd(name, differentiate, setup_context=remember)
    registered: Callable[..., tuple[Tensor, Tensor]] = getattr(torch.ops.medmamba, operator).default
    return registered


def _shapes_of_gradients(dy: Tensor, *inputs_and_kept: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs_and_kept[:-1])
