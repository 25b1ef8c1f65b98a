"""Steps whose gradients are not finite: never made, counted, and an error where they repeat.

What such a step would have changed stays as it was: weights, moments and AdamW's count of steps, BatchNorm's running
statistics. The samples it took count as used, and the schedule moves on. All ranks decide alike: at ZeRO 0 their
gradients are equal once they are averaged, at stages 1 to 3 DeepSpeed shares the norm of its parts.

At ZeRO 0 nothing waits for the device: fused AdamW takes the flag `found_inf` as a tensor, and the counts come to the
host a few steps late. At stages 1 to 3 DeepSpeed reads the norm anyway, and skips the step itself.
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

IN_A_ROW = 5  # steps that are skipped one after the other end the training,
SHARE = 0.1  # and so does more than this share of an epoch's steps, from IN_A_ROW on
SHOWN_KEYS = 32
_REMEDY = "lower train.optim.lr, set train.optim.clip_norm, or use precision float32, with another --run NAME"
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
        return Skips(*(int(value) for value in self._mirror.read(wait=wait)))


class Skips(NamedTuple):
    """What is known of the steps that were skipped."""

    total: int
    row: int
    """How many the last steps of all were."""
    longest: int
    """The most in a row."""
    last: int
    """The number of the last one."""


class WatchedEpoch:
    """Reports the skipped steps of one epoch, and ends the training where they repeat.

    Args:
        guard: Counts them.
        describe: Says of a step of this epoch which samples it took, and what is stored of the training.
        warn: Gets a line about steps that were skipped.
        steps_before: Steps of the training before this epoch.
    """

    def __init__(
        self, guard: StepGuard, describe: Callable[[int], str], warn: Callable[[str], None], *, steps_before: int
    ) -> None:
        self._guard, self._describe, self._warn, self._steps_before = guard, describe, warn, steps_before
        self._told = guard.look(wait=True).total

    def step(self, step: int) -> None:
        """After each step, with its number in the training; raises TrainingError after IN_A_ROW that were skipped."""
        self._guard.count(step)
        self._report(self._guard.look())

    def made(self, losses: Sequence[float]) -> list[float]:
        """The losses of the epoch's steps without those of skipped ones, which are nan; waits for the device.

        Raises TrainingError where too many were skipped, or a step that was made had a loss that is not finite.
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
            raise TrainingError(f"the training loss became infinite: it must stay finite; {_REMEDY}")
        return made

    def _report(self, skips: Skips) -> None:
        new, self._told = skips.total - self._told, skips.total
        if not new:
            return
        which = f"step {skips.last}" if new == 1 else f"{new} steps up to step {skips.last}"
        self._warn(
            f"{which} skipped: the gradients are not finite ({skips.total} so far; {IN_A_ROW} in a row, or more than "
            f"{SHARE:.0%} of an epoch, end the training)"
        )
        if skips.longest >= IN_A_ROW:
            raise TrainingError(self._refusal(f"{skips.longest} steps in a row, up to step {skips.last},", skips.last))

    def _refusal(self, which: str, last: int) -> str:
        return (
            f"{which} had gradients that are not finite and were skipped; at most {IN_A_ROW - 1} in a row and "
            f"{SHARE:.0%} of an epoch are allowed. {self._describe(last)}. {_REMEDY.capitalize()}; or look at these "
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
    """Watches the epoch that `state` is in.

    Args:
        guard: Counts the steps that were skipped.
        state: Where the training stands.
        keys: Of the epoch's samples, in their order.
        batch_size: Samples of a step.
        checkpoints: Names those that are stored, oldest first.
        warn: Gets a line about steps that were skipped.
    """
    before = state.step - state.consumed // batch_size

    def describe(step: int) -> str:
        begin = (step - before - 1) * batch_size
        names = name_samples(keys[begin : begin + batch_size].tolist())
        stored: list[str] = []
        with contextlib.suppress(StoreError):  # the store may be away, which is not what ended the training
            stored = list(checkpoints())[-1:]
        last = f"the last good checkpoint is {stored[0]}" if stored else "there is no checkpoint yet"
        return f"Step {step} took the samples {names}; {last}"

    return WatchedEpoch(guard, describe, warn, steps_before=before)


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
