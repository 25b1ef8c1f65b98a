"""AdamW's state as whole tensors, whatever DeepSpeed's ZeRO stage has cut it into.

At stage 0 DeepSpeed steps the torch optimizer over the parameters themselves. At stages 1 and 2 it steps one flat
partition per group and rank, at stage 3 one per sub-group; `deepspeed.utils.tensor_fragment` knows the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def read_moments(
    optimizer: Any, stage: int, parameters: Sequence[nn.Parameter]
) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor]:
    """(moment -> a copy for each parameter, in its shape; the number of optimizer steps, a scalar tensor).

    Every rank calls it, after at least one step: at stages 1 to 3 the parts are put together by collectives.
    """
    torch_optimizer = optimizer if stage == 0 else optimizer.optimizer
    if not torch_optimizer.state:  # DeepSpeed has skipped every step so far
        _begin(optimizer, stage, step=0.0)
    step = next(state["step"] for state in torch_optimizer.state.values()).detach().clone()
    if stage == 0:
        states = [optimizer.state[parameter] for parameter in parameters]
        return {name: [state[name].detach().clone() for state in states] for name in MOMENTS}, step
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(optimizer, stage)
    return {name: [safe_get_full_optimizer_state(each, name) for each in parameters] for name in MOMENTS}, step


def write_moments(
    optimizer: Any,
    stage: int,
    parameters: Sequence[nn.Parameter],
    moments: Mapping[str, Sequence[torch.Tensor]],
    step: float,
) -> None:
    """Gives an optimizer that has made no step yet the state that `read_moments` returned; every rank calls it."""
    if stage == 0:
        for index, parameter in enumerate(parameters):
            parts = {name: values[index].to(parameter.device).clone() for name, values in moments.items()}
            optimizer.state[parameter] = {"step": _step_like(parameter, step), **parts}
        return
    _begin(optimizer, stage, step)
    for name, values in moments.items():
        for parameter, value in zip(parameters, values, strict=True):
            _set_moment(optimizer, stage, parameter, value, name)


def _begin(optimizer: Any, stage: int, step: float) -> None:
    """Gives DeepSpeed's optimizer at stages 1 to 3 moments that are zero."""
    for part in _stepped(optimizer, stage):
        empty = {name: torch.zeros_like(part, requires_grad=False) for name in MOMENTS}
        optimizer.optimizer.state[part] = {"step": _step_like(part, step), **empty}
    _link(optimizer, stage)


def _set_moment(optimizer: Any, stage: int, parameter: nn.Parameter, value: torch.Tensor, name: str) -> None:
    """Puts this rank's part of a moment where it belongs."""
    if stage < 3:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
        return
    # DeepSpeed's own way raises on the last rank where a parameter does not divide into as many parts as there are
    # ranks: that part is longer than what is left of the value.
    part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=name)
    first = part.numel() * optimizer._get_param_partition_rank(parameter)
    mine = value.flatten()[first : first + part.numel()]
    part[: mine.numel()].copy_(mine)


def _step_like(parameter: torch.Tensor, step: float) -> torch.Tensor:
    """The count of steps as fused AdamW holds it."""
    return torch.full((), step, dtype=torch.float32, device=parameter.device)


def _stepped(optimizer: Any, stage: int) -> Iterable[torch.Tensor]:
    """The tensors that this rank's torch optimizer steps."""
    return optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups


def _link(optimizer: Any, stage: int) -> None:
    """Lets DeepSpeed find the moments of every group; by itself it looks once, after the first group's first step."""
    if stage < 3:
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
