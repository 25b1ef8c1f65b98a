"""AdamW: which parameter decays (by name), and the learning rate of each step (a pure function)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # recipes hold an OptimConfig, and most commands do without torch, which takes 2 s to import
    import torch
    from torch import nn

# Parameters of the selective scan that must not be pulled to zero: decay rates, skip gains and the bias of dt
# (`A_logs` and `dt_projs_bias` have two dimensions, so a rule by dimension would decay them).
UNDECAYED = frozenset({"A_logs", "Ds", "dt_projs_bias", "bias"})


class OptimConfig(BaseModel):
    """AdamW and its learning-rate schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate, for one optimiser step over the global batch."""
    weight_decay: float = Field(default=1e-4, ge=0, le=10)
    """Decoupled weight decay. Norms, biases and the scan's A_logs, Ds and dt_projs_bias never decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of AdamW's running mean and running square of the gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's guard against division by zero."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """cosine: falls smoothly to the end; step: times `gamma` at each of `milestones` (the paper); constant."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs (also a fraction of one) over which the rate rises linearly from near 0 to `lr`."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = (50, 75)
    """Epochs at which the step schedule lowers the rate; read by `schedule=step` only."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """Factor at each milestone; read by `schedule=step` only."""
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of `lr` that the cosine schedule ends at."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Gradients whose global norm is larger are scaled down to it; 0 switches clipping off."""


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Two groups for the optimiser, "decay" and "no_decay", with every trainable parameter in exactly one."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["decay" if decays(model, name) else "no_decay"].append(parameter)
    assert sum(map(len, groups.values())) == sum(p.requires_grad for p in model.parameters())
    return [
        {"name": "decay", "params": groups["decay"], "weight_decay": config.weight_decay},
        {"name": "no_decay", "params": groups["no_decay"], "weight_decay": 0.0},
    ]


def decays(model: nn.Module, name: str) -> bool:
    """Whether the parameter called `name` takes weight decay: a weight that is not a norm's and not exempt."""
    from torch import nn

    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    owner, _, leaf = name.rpartition(".")
    return leaf not in UNDECAYED and not isinstance(model.get_submodule(owner), norms)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the training engine shards its state, the loop sets the rate each step."""
    import torch

    # fused: one kernel for all parameters (nano on a CPU: 1.4 ms a step instead of 4.5)
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def learning_rate(config: OptimConfig, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of optimiser step `step` (counted from 0) in a run of `epochs * steps_per_epoch` steps."""
    assert 0 <= step < epochs * steps_per_epoch, (step, steps_per_epoch, epochs)
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
    if config.schedule == "constant":
        return config.lr
    # The last step, not the one after it, reaches the final fraction.
    progress = (step - warmup) / max(1.0, epochs * steps_per_epoch - 1 - warmup)
    low = config.lr * config.final_lr_fraction
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
