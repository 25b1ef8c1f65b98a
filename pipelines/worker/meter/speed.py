"""Measures the speed of a training and its waiting times with the host's clock, without waiting for the device.

The host runs ahead of a GPU, so a launched step may not have run yet. The recent speed is therefore measured between
two moments at which the loop had to wait for the device anyway.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

from pipelines.worker.checkpoint.usage import Usage
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.engine.engine import Engine
from pipelines.worker.meter.gpu_monitor import GpuMonitor
from pipelines.worker.meter.peak import peak_images_per_s

LAST_STEPS = 20  # least number of steps in the recent window, once that many were made
Batch = TypeVar("Batch")


class Gpu(Protocol):
    """What a meter needs from the monitor of its rank's GPU (gpu_monitor.GpuMonitor)."""

    name: str

    def figures(self) -> dict[str, float]:
        """Memory, and the mean utilization since the last `restart`."""

    def restart(self) -> None:
        """Resets the mean utilization."""

    def energy_j(self) -> float:
        """Joules since the monitor started."""


class Look(NamedTuple):
    """A moment at which all earlier steps were done: steps of the epoch, training clock, seconds waited for data."""

    steps: int
    at_s: float
    waited_s: float


class Part(NamedTuple):
    """One rank's figures at the end of an epoch."""

    figures: dict[str, float]
    gpu: str
    held_s: float
    energy_j: float


class Meter:
    """Measures one process's part of a training.

    Args:
        images: Images per step, over all ranks.
        gpu: The monitor of this rank's GPU; None on a CPU, where steps are done as soon as they return.
        peak_images_per_s: Speed of all ranks at the peak of their GPUs; None if unknown.
        before: Usage of earlier processes, from the checkpoint.
        profiler: Profiles a few steps (profile.StepProfiler); None: no profiling.
        clock: Returns seconds.
    """

    def __init__(
        self,
        images: int,
        *,
        gpu: Gpu | None = None,
        peak_images_per_s: float | None = None,
        before: Usage | None = None,
        profiler: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images, self._gpu, self._peak, self._clock = images, gpu, peak_images_per_s, clock
        self._before, self._own, self.usage = before or Usage(), Usage(), before or Usage()
        self._profiler = profiler
        self._began_s = clock()
        self._aside_s = 0.0  # spent in validation and checkpoints since the start
        self._epochs, self._steady_began_s = 0, 0.0
        self._validation_s = self._writing_s = self._written_s = 0.0  # _written_s: the previous checkpoint
        self._restart()

    def _restart(self) -> None:
        self._steps, self._waited_s, self._trained_s = 0, 0.0, 0.0
        self._is_counted = False
        self._epoch_began_s = self._training_clock()
        self._looks = deque([self._now()])

    def begin_epoch(self) -> None:
        """Called before the epoch's loader is opened."""
        self._epochs += 1
        self._written_s, self._writing_s = self._writing_s, 0.0
        self._restart()
        if self._epochs == 2:
            self._steady_began_s = self._epoch_began_s
        if self._gpu:
            self._gpu.restart()

    def fetched(self, stream: Iterable[Batch], steps: int) -> Iterator[Batch]:
        """Yields the batches of an epoch with `steps` steps; the time until each arrives counts as waiting for data."""
        if self._profiler:
            self._profiler.begin_epoch(steps)
        batches = iter(stream)
        while True:
            with self.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context around waiting for data."""
        began_s = self._clock()
        with self._profiler.waiting() if self._profiler else contextlib.nullcontext():
            yield
        self._waited_s += self._clock() - began_s

    def step(self, *, looked: bool = False) -> None:
        """Called after each optimizer step; `looked`: the loop has just waited for the device."""
        self._steps += 1
        if looked or self._gpu is None:
            self._looks.append(self._now())
            while len(self._looks) > 2 and self._looks[1].steps <= self._steps - LAST_STEPS:
                self._looks.popleft()
        if self._profiler:
            self._profiler.step()

    def end_training(self) -> None:
        """Called after the epoch's last step, once the device has finished it."""
        ended_s = self._training_clock()
        self._trained_s = ended_s - self._epoch_began_s
        images = self._steps * self._images
        self._is_counted = True
        self._own.epochs += 1
        self._own.images += images
        if self._epochs > 1:
            self._own.steady_images += images
            self._own.steady_s = ended_s - self._steady_began_s
        self._seen = self._gpu.figures() if self._gpu else {}

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Context around an epoch's validation; checkpoints written inside count as checkpoint time."""
        began_s, written_s = self._clock(), self._writing_s
        yield
        self._validation_s = self._clock() - began_s - (self._writing_s - written_s)
        self._own.validation_s += self._validation_s
        self._aside_s += self._validation_s

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Context around everything that writes or uploads a checkpoint."""
        began_s = self._clock()
        yield
        taken_s = self._clock() - began_s
        self._writing_s += taken_s
        self._own.checkpoint_s += taken_s
        self._aside_s += taken_s

    def epoch(self, gather: Callable[[Any], list[Any]] = lambda value: [value]) -> dict[str, float]:
        """Figures of the epoch just trained and validated, over all ranks; every rank must call it.

        `checkpoint_s` is for the previous checkpoint, because this epoch's is written after its figures.
        """
        name, energy_j = (self._gpu.name, self._gpu.energy_j()) if self._gpu else ("", 0.0)
        parts = gather(Part(self._figures(), name, self._clock() - self._began_s, energy_j))
        self._own.wall_s = self._clock() - self._began_s
        self._own.energy_j = sum(part.energy_j for part in parts)
        names = {part.gpu for part in parts} - {""}
        self._own.gpu_s = {name: sum(part.held_s for part in parts if part.gpu == name) for name in names}
        self.usage = self._before.plus(self._own)
        return _over_ranks([part.figures for part in parts])

    def usage_now(self, ranks: int) -> Usage:
        """Usage so far, in the middle of an epoch or its validation, assuming that all ranks used as much as this one.

        The epoch is not included: a training that resumes here will count it.
        """
        held_s, own = self._clock() - self._began_s, self._own
        images = own.images + (0 if self._is_counted else self._steps * self._images)
        now: dict[str, Any] = {"images": images, "epochs": own.epochs - self._is_counted, "wall_s": held_s}
        if self._gpu:
            now |= {"gpu_s": {self._gpu.name: held_s * ranks}, "energy_j": self._gpu.energy_j() * ranks}
        return self._before.plus(own.model_copy(update=now))

    @property
    def images_per_s(self) -> float:
        """Speed of the epoch's training part, once it has ended."""
        return self._steps * self._images / self._trained_s if self._trained_s > 0 else 0.0

    def speed(self) -> dict[str, float]:
        """The metric `images_per_s`; empty if an earlier process made all steps of the epoch."""
        return {"images_per_s": self.images_per_s} if self._steps else {}

    def last_steps(self, left: int) -> dict[str, float]:
        """Recent speed, share of waiting, and time remaining for the `left` steps, for the progress display."""
        return {
            "images_per_s": self.images_per_s_last,
            "wait_share": self.wait_share_last,
            "left_s": self.left_s(left),
        }

    @property
    def images_per_s_last(self) -> float:
        """Speed of the last steps."""
        steps, seconds, _ = self._window()
        return steps * self._images / seconds if seconds > 0 else 0.0

    @property
    def wait_share_last(self) -> float:
        """Share of the last steps' time in which the host waited for data."""
        _, seconds, waited_s = self._window()
        return waited_s / seconds if seconds > 0 else 0.0

    def left_s(self, steps: int) -> float:
        """Seconds that `steps` steps take at the recent speed."""
        done, seconds, _ = self._window()
        return steps * seconds / done if done else 0.0

    def _training_clock(self) -> float:
        """Seconds, not counting validation and checkpoints."""
        return self._clock() - self._aside_s

    def _now(self) -> Look:
        return Look(self._steps, self._training_clock(), self._waited_s)

    def _window(self) -> Look:
        """The recent window: its steps, its seconds, and the seconds waited for data."""
        then = self._looks[0]
        now = self._looks[-1] if len(self._looks) > 1 else self._now()
        return Look(now.steps - then.steps, now.at_s - then.at_s, now.waited_s - then.waited_s)

    def _figures(self) -> dict[str, float]:
        """This rank's figures of the epoch, for the steps that this process made."""
        trained_s = max(self._trained_s, 1e-9)
        of_steps = {
            "images_per_s": self.images_per_s,
            "images_per_s_last": self.images_per_s_last,
            "step_ms": 1e3 * trained_s / max(self._steps, 1),
            "data_wait_share": self._waited_s / trained_s,
            "data_wait_share_last": self.wait_share_last,
            **({"mfu": self.images_per_s / self._peak} if self._peak else {}),
        }
        return {
            **(of_steps if self._steps else {}),
            "validation_s": self._validation_s,
            **({"checkpoint_s": self._written_s} if self._epochs > 1 else {}),
            **self._seen,
        }


@contextlib.contextmanager
def metered(config: TrainStepConfig, engine: Engine, before: Usage, profiler: Any = None) -> Iterator[Meter]:
    """Context that gives the meter of a training; `before` is the usage of earlier processes."""
    train, gpu, peak = config.train, None, None
    if engine.device.type == "cuda":
        gpu = GpuMonitor(engine.device)
        peak = peak_images_per_s(config.model, train.image_size, gpu.name, train.precision)
    try:
        yield Meter(
            train.batch_size,
            gpu=gpu,
            peak_images_per_s=peak * engine.ranks if peak else None,
            before=before,
            profiler=profiler,
        )
    finally:
        if gpu:
            gpu.close()


def _over_ranks(parts: list[dict[str, float]]) -> dict[str, float]:
    """Rank 0's figures, but the mean utilization and the largest memory and waiting time over all ranks."""
    figures = dict(parts[0])
    for name in figures:
        every = [part[name] for part in parts if name in part]
        if name == "gpu_utilization":
            figures[name] = sum(every) / len(every)
        elif name.startswith(("gpu_", "data_wait_")):
            figures[name] = max(every)
    return figures
