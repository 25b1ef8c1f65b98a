"""BatchNorm's running statistics, averaged over all micro-batches of a step and updated once.

torch would update them once per micro-batch, each rank on its own. Then they depend on how a step is cut into ranks,
and the ranks disagree. Here every micro-batch leaves its own statistics in the buffers (momentum 1: the new value
replaces the old), a step's are averaged over micro-batches and ranks in one all-reduce, and the running value moves
by the module's own momentum once. So the number of ranks changes nothing but rounding. Frozen ones are left alone.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from medmamba.finetune import FrozenNorm


class BatchStatistics:
    """Owns the running statistics of every BatchNorm in `model` that is not frozen, while it trains.

    Buffers hold the last micro-batch's statistics between `collect` calls; `update` puts the running ones there,
    so the model can be evaluated or saved after any finished step.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._norms = [norm for norm in norms if not isinstance(norm, FrozenNorm)]
        self._momentum = [norm.momentum if norm.momentum is not None else 0.1 for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 1.0
        buffers = [b for norm in self._norms for b in (norm.running_mean, norm.running_var)]
        held = [b for b in buffers if b is not None]
        momenta = [m for m in self._momentum for _ in range(2)]
        spread = [torch.full((b.numel(),), m) for b, m in zip(held, momenta, strict=True)]
        self._rate = torch.cat(spread).to(device) if spread else torch.zeros(0, device=device)
        self._buffers = _as_one(held, self._rate)
        # The last element carries the loss, so that it costs no collective of its own.
        self._sum = torch.zeros(self._rate.numel() + 1, device=device)
        self._count = 0
        self.reload()

    def reload(self) -> None:
        """Takes the running statistics from the model's buffers (after a checkpoint was loaded into it)."""
        self._running = self._buffers.clone()

    @torch.no_grad()
    def collect(self, loss: torch.Tensor) -> None:
        """After a forward pass: adds this micro-batch's statistics and loss to the step's."""
        self._sum[:-1] += self._buffers
        self._sum[-1] += loss.detach().float()
        self._count += 1

    @torch.no_grad()
    def update(self, skipped: torch.Tensor | None = None) -> torch.Tensor:
        """After the step's last micro-batch: returns the step's mean loss (a scalar tensor on the device).

        `skipped` is 1 on the device where the step was not made: then the running statistics stay, and the loss is nan.
        None: it was made.
        """
        world = 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sum)
            world = dist.get_world_size()
        mean = self._sum / (self._count * world)
        moved = self._running + self._rate * (mean[:-1] - self._running)
        self._running = moved if skipped is None else torch.where(skipped > 0, self._running, moved)
        self._buffers.copy_(self._running)
        self._sum.zero_()
        self._count = 0
        # A tensor of its own: the losses of an epoch are kept, and a view would keep all the statistics.
        return mean[-1].clone() if skipped is None else torch.where(skipped > 0, math.nan, mean[-1])


def _as_one(buffers: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """All buffers in one tensor of the shape of `like`, of which they are views from now on: one kernel, not sixty."""
    whole, start = torch.empty_like(like), 0
    for buffer in buffers:
        view = whole[start : start + buffer.numel()].view_as(buffer)
        view.copy_(buffer)
        buffer.data = view
        start += buffer.numel()
    return whole
