"""Reads and writes AdamW's state as complete tensors, independent of how DeepSpeed's ZeRO stage partitions it.

At stage 0 the torch optimizer works on the parameters themselves. At stages 1 and 2 it works on one flat partition per
group and rank, at stage 3 on one per sub-group; `deepspeed.utils.tensor_fragment` maps those back to parameters.
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
    """Returns ({moment: a copy per parameter, in its shape}, number of optimizer steps as a scalar tensor).

    Every rank must call it, after at least one step: stages 1 to 3 gather the partitions with collectives.
    """
    torch_optimizer = optimizer if stage == 0 else optimizer.optimizer
    if not torch_optimizer.state:  # every step so far was skipped
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
    """Restores what `read_moments` returned into an optimizer before its first step; every rank must call it."""
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
    """Creates zero moments in DeepSpeed's optimizer at stages 1 to 3."""
    for part in _stepped(optimizer, stage):
        empty = {name: torch.zeros_like(part, requires_grad=False) for name in MOMENTS}
        optimizer.optimizer.state[part] = {"step": _step_like(part, step), **empty}
    _link(optimizer, stage)


def _set_moment(optimizer: Any, stage: int, parameter: nn.Parameter, value: torch.Tensor, name: str) -> None:
    """Writes this rank's part of a moment."""
    if stage < 3:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
        return
    # DeepSpeed's own setter raises on the last rank if a parameter does not divide evenly among the ranks, because
    # that rank's partition is padded.
    part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=name)
    first = part.numel() * optimizer._get_param_partition_rank(parameter)
    mine = value.flatten()[first : first + part.numel()]
    part[: mine.numel()].copy_(mine)


def _step_like(parameter: torch.Tensor, step: float) -> torch.Tensor:
    """The step count in the form that fused AdamW stores."""
    return torch.full((), step, dtype=torch.float32, device=parameter.device)


def _stepped(optimizer: Any, stage: int) -> Iterable[torch.Tensor]:
    """The tensors that this rank's torch optimizer updates."""
    return optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups


def _link(optimizer: Any, stage: int) -> None:
    """Makes DeepSpeed link the moments of every group; by itself it only does so after the first group's first step."""
    if stage < 3:
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
