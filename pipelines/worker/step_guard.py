"""Steps whose gradients are not finite: never made, counted, and an error where they repeat.

What such a step would have changed stays as it was: weights, moments and AdamW's count of steps, BatchNorm's running
statistics. The samples it took count as used, and the schedule moves on. All ranks decide alike: at ZeRO 0 their
gradients are equal once they are averaged, at stages 1 to 3 DeepSpeed shares the norm of its parts.

At ZeRO 0 nothing waits for the device: fused AdamW takes the flag `found_inf` as a tensor, and the counts come to the
host a few steps late. At stages 1 to 3 DeepSpeed reads the norm anyway, and skips the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

IN_A_ROW = 5  # steps that are skipped one after the other end the training,
SHARE = 0.1  # and so does more than this share of an epoch's steps, from IN_A_ROW on
SHOWN_KEYS = 32
_TOTAL, _ROW, _LONGEST, _LAST = range(4)


class TrainingError(ValueError):
    """The numbers went wrong: going on would waste the machine."""


class StepGuard:
    """Counts the steps of this process that were skipped.

    `skipped` is a scalar on the device: 1 where the last step was skipped, else 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.skipped = torch.zeros((), device=device)
        self._counts = torch.zeros(4, dtype=torch.float64, device=device)  # exact for steps up to 2 ** 53
        self._mirror = _Mirror(self._counts)
        self._told = 0

    @torch.no_grad()
    def watch(self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Before the step of a torch optimizer: lets it skip the step where the norm of the gradients is not finite."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        self.skipped.copy_(~torch.isfinite(norms.square().sum()))
        optimizer.found_inf = self.skipped  # type: ignore[attr-defined]

    def note(self, *, skipped: bool) -> None:
        """After a step of which DeepSpeed has said whether it was skipped."""
        self.skipped.fill_(float(skipped))

    @torch.no_grad()
    def count(self, step: int) -> None:
        """Once after each step, with its number (1 for the first of the training)."""
        total, row, longest, last = self._counts.unbind()
        total += self.skipped
        row.add_(1).mul_(self.skipped)
        torch.maximum(longest, row, out=longest)
        last.copy_(torch.where(self.skipped > 0, float(step), last))
        self._mirror.refresh()

    def look(self, *, wait: bool = False) -> Skips:
        """What is known of the skipped steps by now; of all of them with `wait`, which waits for the device."""
        total, _, longest, last = (int(value) for value in self._mirror.read(wait=wait))
        new, self._told = total - self._told, total
        return Skips(total, new, longest, last)


@dataclass(frozen=True)
class Skips:
    """How many steps were skipped in this process."""

    total: int
    new: int
    """Since the last look."""
    longest: int
    """In a row."""
    last: int
    """The number of the last one."""

    @property
    def notice(self) -> str:
        """For the user, about the new ones; empty where there are none."""
        if not self.new:
            return ""
        which = f"step {self.last}" if self.new == 1 else f"{self.new} steps up to step {self.last}"
        return (
            f"{which} skipped: the gradients are not finite ({self.total} so far; {IN_A_ROW} in a row, or more than "
            f"{SHARE:.0%} of an epoch, end the training)"
        )

    def check_row(self, describe: Callable[[int], str]) -> None:
        """Raises TrainingError where too many steps were skipped one after the other.

        `describe` says of a step which samples it took and what the last checkpoint is.
        """
        if self.longest >= IN_A_ROW:
            raise TrainingError(
                _refusal(f"{self.longest} steps in a row, up to step {self.last},", self.last, describe)
            )

    def check_epoch(self, skipped: int, steps: int, describe: Callable[[int], str]) -> None:
        """Raises TrainingError where too many of the steps of an epoch were skipped."""
        if skipped and (skipped == steps or (skipped >= IN_A_ROW and skipped > SHARE * steps)):
            which = f"{skipped} of the {steps} steps of the epoch, the last of them step {self.last},"
            raise TrainingError(_refusal(which, self.last, describe))


def _refusal(which: str, last: int, describe: Callable[[int], str]) -> str:
    return (
        f"{which} had gradients that are not finite and were skipped; at most {IN_A_ROW - 1} in a row, and {SHARE:.0%} "
        f"of an epoch, may be. {describe(last)}. Lower train.optim.lr, set train.optim.clip_norm, or use precision "
        "float32, with another --run NAME; or look at these samples"
    )


def name_samples(keys: Sequence[str]) -> str:
    """The keys of a step's samples, as far as a message holds them."""
    shown = " ".join(keys[:SHOWN_KEYS])
    return shown + (f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")


class _Mirror:
    """A copy on the host of a small tensor on the device, refreshed without waiting."""

    def __init__(self, source: torch.Tensor) -> None:
        self._source, self._on_device = source, source.device.type == "cuda"
        self._here = torch.zeros_like(source, device="cpu", pin_memory=self._on_device)
        self._arrival: Any = None
        self._values = self._here.tolist()

    def refresh(self) -> None:
        """Sends for the present values, unless some are on their way."""
        if not self._on_device:
            self._values = self._source.tolist()
        elif self._arrived():
            self._here.copy_(self._source, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self, *, wait: bool = False) -> list[float]:
        """The values that arrived last; the present ones with `wait`."""
        if wait and self._on_device:
            self._values, self._arrival = self._source.tolist(), None
        self._arrived()
        return self._values

    def _arrived(self) -> bool:
        if self._arrival is not None and self._arrival.query():
            self._values, self._arrival = self._here.tolist(), None
        return self._arrival is None
