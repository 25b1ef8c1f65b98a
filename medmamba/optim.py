"""AdamW: weight decay by parameter name, and the learning rate of each step as a pure function."""

from __future__ import annotations

import functools
import inspect
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # recipes contain an OptimConfig, and importing torch takes 2 s that most commands save
    import torch
    from torch import nn

# Decay rates, skip gains and the bias of dt must not be pulled to zero. A rule by dimension would decay `A_logs` and
# `dt_projs_bias`, which have two.
UNDECAYED = frozenset({"A_logs", "Ds", "dt_projs_bias", "bias"})
# A block of MedMamba (layers.<stage>.blocks.<i>.) or of the ConvNet (blocks.<i>.), and the patch merging of a stage.
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
    """Decay rates of AdamW's running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's term against division by zero."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """cosine: decreases smoothly to the end; step: times `gamma` at each of `milestones` (the paper); constant."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs (fractions allowed) over which the rate rises linearly from near 0 to `lr`."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = (50, 75)
    """Epochs at which the step schedule lowers the rate; only for `schedule=step`."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """Factor at each milestone; only for `schedule=step`."""
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """Final rate of the cosine schedule as a fraction of `lr`."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Maximum global norm of the gradients, larger ones are scaled down; 0: no clipping."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """For fine-tuning: the learning rate of a block as a fraction of the next block's; the head gets the full rate.
    1: the same rate everywhere."""


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: every trainable parameter is in exactly one, and none is empty.

    A group's learning rate is `learning_rate(...) * lr_scale`. With `layer_decay` 1 there are at most two groups,
    "decay" and "no_decay", with scale 1. Otherwise there are at most two for each depth d of D (`layer_depths`),
    "decay 0" and so on, with scale layer_decay ** (D - d).
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
    """Depth of every parameter by name: 0 for the stem, i for the i-th of N blocks, N + 1 for norm and head.

    This is BEiT's rule (Bao et al., arXiv 2106.08254, `get_num_layer_for_vit` in its code), which timm's
    `param_groups_layer_decay` also uses. Blocks are counted over all stages; patch merging belongs to the block before
    it, as in timm's Swin.
    """
    names = [name for name, _ in model.named_parameters()]
    blocks = dict.fromkeys(found.group() for name in names if (found := _BLOCK.match(name)))
    depth_of = {block: depth for depth, block in enumerate(blocks, 1)}
    depths, depth = {}, 0
    for name in names:  # in network order: stem, blocks and merging, head
        if found := _BLOCK.match(name):
            depth = depth_of[found.group()]
        elif depth and not _MERGING.match(name):
            depth = len(blocks) + 1
        depths[name] = depth
    return depths


def decays(model: nn.Module, name: str) -> bool:
    """Whether weight decay applies to the parameter: not to parameters of norms and not to UNDECAYED ones."""
    from torch import nn

    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    owner, _, leaf = name.rpartition(".")
    return leaf not in UNDECAYED and not isinstance(model.get_submodule(owner), norms)


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the training engine shards its state, and the loop sets the rate of each step."""
    # fused: one kernel for all parameters (nano on a CPU: 1.4 ms per step instead of 4.5)
    return _adamw()(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@functools.cache
def _adamw() -> type[torch.optim.AdamW]:
    """torch's AdamW without the decorators that exclude its methods from compilation.

    Those import torch's compiler, which costs every worker and trial 1.5 s, or 6 s without cached bytecode.
    """
    import torch

    base: Any = torch.optim.AdamW
    plain_step = inspect.unwrap(base.step)

    class AdamW(base):  # type: ignore[misc]  # its methods are typed, but not what unwrap() needs
        add_param_group = inspect.unwrap(base.add_param_group)
        zero_grad = inspect.unwrap(base.zero_grad)
        state_dict = inspect.unwrap(base.state_dict)
        load_state_dict = inspect.unwrap(base.load_state_dict)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            return plain_step(self, closure)

    return AdamW


def learning_rate(config: OptimConfig, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of optimizer step `step` (from 0) in a run of `epochs * steps_per_epoch` steps."""
    assert 0 <= step < epochs * steps_per_epoch, (step, steps_per_epoch, epochs)
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
    if config.schedule == "constant":
        return config.lr
    # The last step reaches the final fraction exactly.
    progress = (step - warmup) / max(1.0, epochs * steps_per_epoch - 1 - warmup)
    low = config.lr * config.final_lr_fraction
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
