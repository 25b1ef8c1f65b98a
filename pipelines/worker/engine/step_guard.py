"""Skips and counts steps with non-finite gradients, and ends the training if they repeat.

A skipped step changes nothing: weights, moments, AdamW's step count and BatchNorm's running statistics stay as they
were. Its samples count as used, and the schedule advances. All ranks decide the same: at ZeRO 0 their averaged
gradients are equal, at stages 1 to 3 DeepSpeed shares the norm of the partitions.

At ZeRO 0 nothing waits for the device: fused AdamW reads the flag `found_inf` as a tensor, and the counts reach the
host a few steps late. At stages 1 to 3 DeepSpeed reads the norm anyway and skips the step itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from data_shards.store import StoreError
from pipelines.worker.state import TrainState

IN_A_ROW = 5  # this many consecutive skipped steps end the training
SHARE = 0.1  # so do IN_A_ROW or more skipped steps that exceed this share of an epoch
SHOWN_KEYS = 32
_REMEDY = "lower train.optim.lr, set train.optim.clip_norm, or use precision float32, with another --run NAME"
_TOTAL, _ROW, _LONGEST, _LAST = range(4)


class TrainingError(ValueError):
    """The training diverged; continuing would be useless."""


class StepGuard:
    """Counts the skipped steps of this process.

    `skipped` is a scalar tensor on the device: 1 if the last step was skipped, otherwise 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.skipped = torch.zeros((), device=device)
        self._counts = torch.zeros(4, dtype=torch.float64, device=device)  # exact for steps up to 2 ** 53
        self._mirror = _Mirror(self._counts)

    @torch.no_grad()
    def watch(self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Called before a torch optimizer's step: makes it skip the step if the gradient norm is not finite."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        self.skipped.copy_(~torch.isfinite(norms.square().sum()))
        optimizer.found_inf = self.skipped  # type: ignore[attr-defined]

    def note(self, *, skipped: bool) -> None:
        """Called after a step at stages 1 to 3, with DeepSpeed's own decision."""
        self.skipped.fill_(float(skipped))

    @torch.no_grad()
    def count(self, step: int) -> None:
        """Called once after each step with its number; the first step of the training is 1."""
        total, row, longest, last = self._counts.unbind()
        total += self.skipped
        row.add_(1).mul_(self.skipped)
        torch.maximum(longest, row, out=longest)
        last.copy_(torch.where(self.skipped > 0, float(step), last))
        self._mirror.refresh()

    def look(self, *, wait: bool = False) -> Skips:
        """The counts known so far; with `wait`, the exact counts after waiting for the device."""
        return Skips(*(int(value) for value in self._mirror.read(wait=wait)))


class Skips(NamedTuple):
    """Counts of skipped steps."""

    total: int
    row: int
    """Consecutive skipped steps up to the most recent step."""
    longest: int
    """The longest run of skipped steps."""
    last: int
    """The number of the last skipped step."""


class WatchedEpoch:
    """Reports the skipped steps of one epoch, and ends the training if they repeat.

    Args:
        guard: Counts the skipped steps.
        describe: Returns a sentence about a step's samples and the last checkpoint, for the error.
        warn: Called with a line about newly skipped steps.
        steps_before: Steps of the training before this epoch.
    """

    def __init__(
        self, guard: StepGuard, describe: Callable[[int], str], warn: Callable[[str], None], *, steps_before: int
    ) -> None:
        self._guard, self._describe, self._warn, self._steps_before = guard, describe, warn, steps_before
        self._reported = guard.look(wait=True).total

    def step(self, step: int) -> None:
        """Called after each step with its number. Raises TrainingError after IN_A_ROW consecutive skipped steps."""
        self._guard.count(step)
        self._report(self._guard.look())

    def made(self, losses: Sequence[float]) -> list[float]:
        """Filters the losses of skipped steps, which are NaN, out of an epoch's `losses`; waits for the device.

        Raises TrainingError if too many steps were skipped or another step's loss is infinite.
        """
        self._report(self._guard.look(wait=True))
        made = [loss for loss in losses if not math.isnan(loss)]
        skipped = len(losses) - len(made)
        if skipped and (not made or (skipped >= IN_A_ROW and skipped > SHARE * len(losses))):
            last = self._steps_before + max(n for n, loss in enumerate(losses, 1) if math.isnan(loss))
            raise TrainingError(
                self._refusal(f"{skipped} of the {len(losses)} steps of the epoch, the last of them step {last},", last)
            )
        if not all(map(math.isfinite, made)):
            raise TrainingError(f"the training loss became infinite; {_REMEDY}")
        return made

    def _report(self, skips: Skips) -> None:
        new, self._reported = skips.total - self._reported, skips.total
        if not new:
            return
        which = f"step {skips.last}" if new == 1 else f"{new} steps up to step {skips.last}"
        self._warn(
            f"{which} skipped: non-finite gradients ({skips.total} so far; {IN_A_ROW} in a row or more than "
            f"{SHARE:.0%} of an epoch end the training)"
        )
        if skips.longest >= IN_A_ROW:
            raise TrainingError(self._refusal(f"{skips.longest} steps in a row, up to step {skips.last},", skips.last))

    def _refusal(self, which: str, last: int) -> str:
        return (
            f"{which} had non-finite gradients and were skipped; at most {IN_A_ROW - 1} in a row and "
            f"{SHARE:.0%} of an epoch are allowed. {self._describe(last)}. {_REMEDY.capitalize()}; or inspect these "
            "samples"
        )


def watch_steps(
    guard: StepGuard,
    state: TrainState,
    keys: np.ndarray,
    batch_size: int,
    checkpoints: Callable[[], Sequence[str]],
    warn: Callable[[str], None],
) -> WatchedEpoch:
    """Watches the current epoch of `state`.

    Args:
        guard: Counts the skipped steps.
        state: The state at the start or in the middle of the epoch.
        keys: Keys of the epoch's samples (n,), in training order.
        batch_size: Samples per step.
        checkpoints: Returns the names of the stored checkpoints, oldest first.
        warn: Called with a line about newly skipped steps.
    """
    before = state.step - state.consumed // batch_size

    def describe(step: int) -> str:
        begin = (step - before - 1) * batch_size
        names = name_samples(keys[begin : begin + batch_size].tolist())
        stored: list[str] = []
        with contextlib.suppress(StoreError):  # an unavailable store must not hide the real error
            stored = list(checkpoints())[-1:]
        last = f"the last good checkpoint is {stored[0]}" if stored else "no checkpoint has been written yet"
        return f"Step {step} used the samples {names}; {last}"

    return WatchedEpoch(guard, describe, warn, steps_before=before)


def name_samples(keys: Sequence[str]) -> str:
    """The keys of a step's samples, shortened for a message."""
    shown = " ".join(keys[:SHOWN_KEYS])
    return shown + (f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")


class _Mirror:
    """A host copy of a small device tensor, refreshed without waiting."""

    def __init__(self, source: torch.Tensor) -> None:
        self._source, self._on_device = source, source.device.type == "cuda"
        self._here = torch.zeros_like(source, device="cpu", pin_memory=self._on_device)
        self._arrival: Any = None
        self._values = self._here.tolist()

    def refresh(self) -> None:
        """Starts copying the current values, unless a copy is already in progress."""
        if not self._on_device:
            self._values = self._source.tolist()
        elif self._arrived():
            self._here.copy_(self._source, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self, *, wait: bool = False) -> list[float]:
        """The values that arrived last; with `wait`, the current ones."""
        if wait and self._on_device:
            self._values, self._arrival = self._source.tolist(), None
        self._arrived()
        return self._values

    def _arrived(self) -> bool:
        if self._arrival is not None and self._arrival.query():
            self._values, self._arrival = self._here.tolist(), None
        return self._arrival is None
