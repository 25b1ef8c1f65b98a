"""AdamW: which parameter decays (by name), and the learning rate of each step (a pure function)."""

from __future__ import annotations

import functools
import inspect
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # recipes hold an OptimConfig, and most commands do without torch, which takes 2 s to import
    import torch
    from torch import nn

# Parameters of the selective scan that must not be pulled to zero: decay rates, skip gains and the bias of dt
# (`A_logs` and `dt_projs_bias` have two dimensions, so a rule by dimension would decay them).
UNDECAYED = frozenset({"A_logs", "Ds", "dt_projs_bias", "bias"})
# A block of MedMamba (layers.<stage>.blocks.<i>.) or of the ConvNet (blocks.<i>.), and what follows a stage's last one.
_BLOCK = re.compile(r"(layers\.\d+\.)?blocks\.\d+\.")
_MERGING = re.compile(r"layers\.\d+\.downsample\.")


class OptimConfig(BaseModel):
    """AdamW and its learning-rate schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate, for one optimizer step over the global batch."""
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
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """For fine-tuning: each block learns at this fraction of the rate of the block after it; the head at the full rate.
    1: all at the same rate."""


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer, with every trainable parameter in exactly one and none empty.

    A group's `lr_scale` is its share of the rate: its learning rate is `learning_rate(...) * lr_scale`. With
    `layer_decay` 1 there are at most two, "decay" and "no_decay", at scale 1; else at most two for each depth d of D
    (`layer_depths`), "decay 0" and so on, at scale layer_decay ** (D - d).
    """
    depths = layer_depths(model)
    last = max(depths.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, rate = ("decay", config.weight_decay) if decays(model, name) else ("no_decay", 0.0)
        scale = config.layer_decay ** (last - depths[name])
        label = kind if config.layer_decay == 1 else f"{kind} {depths[name]}"
        group = groups.setdefault(label, {"name": label, "params": [], "weight_decay": rate, "lr_scale": scale})
        group["params"].append(parameter)
    assert sum(len(group["params"]) for group in groups.values()) == sum(p.requires_grad for p in model.parameters())
    return sorted(groups.values(), key=lambda group: (group["lr_scale"], group["weight_decay"] == 0, group["name"]))


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter by its name: 0 for the stem, i for the i-th block of all N, N + 1 for norm and head.

    This is BEiT's rule (Bao et al., arXiv 2106.08254, `get_num_layer_for_vit` of its code; timm's
    `param_groups_layer_decay` has the same). Blocks are counted over all stages; patch merging belongs to the block
    before it, as in timm's Swin.
    """
    names = [name for name, _ in model.named_parameters()]
    blocks = dict.fromkeys(found.group() for name in names if (found := _BLOCK.match(name)))
    depth_of = {block: depth for depth, block in enumerate(blocks, 1)}
    depths, depth = {}, 0
    for name in names:  # in the order of the network: stem, blocks and merging, head
        if found := _BLOCK.match(name):
            depth = depth_of[found.group()]
        elif depth and not _MERGING.match(name):
            depth = len(blocks) + 1
        depths[name] = depth
    return depths


def decays(model: nn.Module, name: str) -> bool:
    """Whether the parameter called `name` takes weight decay: a weight that is not a norm's and not exempt."""
    from torch import nn

    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    owner, _, leaf = name.rpartition(".")
    return leaf not in UNDECAYED and not isinstance(model.get_submodule(owner), norms)


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the training engine shards its state, the loop sets the rate each step."""
    # fused: one kernel for all parameters (nano on a CPU: 1.4 ms a step instead of 4.5)
    return _adamw()(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@functools.cache
def _adamw() -> type[torch.optim.AdamW]:
    """torch's AdamW without the import of torch's compiler, which its methods load to tell it to leave them alone.

    That takes every worker and trial 1.5 s, and 6 s where Python keeps no bytecode.
    """
    import torch

    base: Any = torch.optim.AdamW
    plain_step = inspect.unwrap(base.step)

    class AdamW(base):
        add_param_group = inspect.unwrap(base.add_param_group)
        zero_grad = inspect.unwrap(base.zero_grad)
        state_dict = inspect.unwrap(base.state_dict)
        load_state_dict = inspect.unwrap(base.load_state_dict)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            return plain_step(self, closure)

    return AdamW


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
