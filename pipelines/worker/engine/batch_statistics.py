"""BatchNorm's running statistics, averaged over all micro-batches of a step and updated once per step.

torch updates them once per micro-batch, on each rank separately, so they depend on how a step is split into ranks, and
the ranks disagree. Here every micro-batch leaves its own statistics in the buffers (momentum 1: the new value replaces
the old). They are averaged over micro-batches and ranks in one all-reduce, and the running value moves once by the
module's own momentum. The number of ranks then only affects rounding. Frozen BatchNorms are not touched.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from medmamba.finetune import FrozenNorm


class BatchStatistics:
    """Manages the running statistics of every BatchNorm in `model` that is not frozen.

    Between `collect` calls the buffers hold the last micro-batch's statistics. `update` restores the running ones, so
    the model can be evaluated or saved after any finished step.
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
        # The last element holds the loss, so that it needs no collective of its own.
        self._sum = torch.zeros(self._rate.numel() + 1, device=device)
        self._count = 0
        self.reload()

    def reload(self) -> None:
        """Reads the running statistics from the model's buffers, after a checkpoint was loaded into it."""
        self._running = self._buffers.clone()

    @torch.no_grad()
    def collect(self, loss: torch.Tensor) -> None:
        """Called after a forward pass: adds this micro-batch's statistics and loss to the step's."""
        self._sum[:-1] += self._buffers
        self._sum[-1] += loss.detach().float()
        self._count += 1

    @torch.no_grad()
    def update(self, skipped: torch.Tensor | None = None) -> torch.Tensor:
        """Called after the step's last micro-batch: returns the step's mean loss, a scalar tensor on the device.

        `skipped` is a scalar tensor on the device; if it is 1, the running statistics stay as they were and the loss is
        NaN. None: the step was not skipped.
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
        # clone(): an epoch's losses are kept, and a view would keep all the statistics alive.
        return mean[-1].clone() if skipped is None else torch.where(skipped > 0, math.nan, mean[-1])


def _as_one(buffers: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Moves all buffers into one tensor shaped like `like` and makes them views of it: one kernel instead of sixty."""
    flat, start = torch.empty_like(like), 0
    for buffer in buffers:
        view = flat[start : start + buffer.numel()].view_as(buffer)
        view.copy_(buffer)
        buffer.data = view
        start += buffer.numel()
    return flat
