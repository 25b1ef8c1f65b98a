"""How fast a training is and what it waits for, by the host's clock: nothing here waits for the device.

A GPU works behind the host, which may have launched steps that have not run yet. So the speed of the last steps is
taken between two moments at which the loop has waited for the device anyway, when it looks at the loss.
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

LAST_STEPS = 20  # the fewest steps that the speed "of the last steps" is taken over, once there are so many
Batch = TypeVar("Batch")


class Gpu(Protocol):
    """What a meter asks of the GPU of its rank (gpu_monitor.GpuMonitor)."""

    name: str

    def figures(self) -> dict[str, float]:
        """Memory, and the mean utilization since the last `restart`."""

    def restart(self) -> None:
        """Forgets the utilization seen so far."""

    def energy_j(self) -> float:
        """Joules since the monitor began."""


class Look(NamedTuple):
    """A moment at which every step before it was done: steps of the epoch, the training clock, seconds waited."""

    steps: int
    at_s: float
    waited_s: float


class Part(NamedTuple):
    """What one rank knows at the end of an epoch."""

    figures: dict[str, float]
    gpu: str
    held_s: float
    energy_j: float


class Meter:
    """Measures one process's part of a training.

    Args:
        images: Images of one step, over all ranks.
        gpu: The GPU of this rank, which works behind the host; None on a CPU, where every step is a look.
        peak_images_per_s: What all ranks would reach at the peak of their GPUs; None where that is not known.
        before: What earlier processes have used, from the checkpoint.
        profiler: Looks into a few steps (profile.StepProfiler); None where nobody asked for it.
        clock: Seconds.
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
        self._aside_s = 0.0  # in validation and checkpoints, since the meter began
        self._epochs, self._steady_began_s = 0, 0.0
        self._validation_s = self._writing_s = self._written_s = 0.0  # of this epoch; of the checkpoint before
        self._restart()

    def _restart(self) -> None:
        self._steps, self._waited_s, self._trained_s = 0, 0.0, 0.0
        self._is_counted = False
        self._epoch_began_s = self._training_clock()
        self._looks = deque([self._now()])

    def begin_epoch(self) -> None:
        """Before the epoch's loader is opened."""
        self._epochs += 1
        self._written_s, self._writing_s = self._writing_s, 0.0
        self._restart()
        if self._epochs == 2:
            self._steady_began_s = self._epoch_began_s
        if self._gpu:
            self._gpu.restart()

    def fetched(self, stream: Iterable[Batch], steps: int) -> Iterator[Batch]:
        """The batches of an epoch of so many steps; the time until each arrives counts as waiting for data."""
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
        """Around whatever waits for data."""
        began_s = self._clock()
        with self._profiler.waiting() if self._profiler else contextlib.nullcontext():
            yield
        self._waited_s += self._clock() - began_s

    def step(self, *, looked: bool = False) -> None:
        """After each optimizer step; `looked` says that the loop has just waited for the device."""
        self._steps += 1
        if looked or self._gpu is None:
            self._looks.append(self._now())
            while len(self._looks) > 2 and self._looks[1].steps <= self._steps - LAST_STEPS:
                self._looks.popleft()
        if self._profiler:
            self._profiler.step()

    def end_training(self) -> None:
        """After the epoch's last step, when the device is done with it."""
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
        """Around the validation after an epoch; a checkpoint that is written meanwhile counts as one."""
        began_s, written_s = self._clock(), self._writing_s
        yield
        self._validation_s = self._clock() - began_s - (self._writing_s - written_s)
        self._own.validation_s += self._validation_s
        self._aside_s += self._validation_s

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around everything that writes, hands on or uploads a checkpoint."""
        began_s = self._clock()
        yield
        taken_s = self._clock() - began_s
        self._writing_s += taken_s
        self._own.checkpoint_s += taken_s
        self._aside_s += taken_s

    def epoch(self, gather: Callable[[Any], list[Any]] = lambda value: [value]) -> dict[str, float]:
        """The figures of the epoch that was just trained and validated, over all ranks; every rank calls it.

        `checkpoint_s` is that of the checkpoint before: this epoch's is written after its figures.
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
        """What was used up to now, in the middle of an epoch or of its validation, if all ranks used what this one did.

        Whoever resumes there counts the epoch.
        """
        held_s, own = self._clock() - self._began_s, self._own
        images = own.images + (0 if self._is_counted else self._steps * self._images)
        now: dict[str, Any] = {"images": images, "epochs": own.epochs - self._is_counted, "wall_s": held_s}
        if self._gpu:
            now |= {"gpu_s": {self._gpu.name: held_s * ranks}, "energy_j": self._gpu.energy_j() * ranks}
        return self._before.plus(own.model_copy(update=now))

    @property
    def images_per_s(self) -> float:
        """Of the epoch's training part, once it has ended."""
        return self._steps * self._images / self._trained_s if self._trained_s > 0 else 0.0

    def speed(self) -> dict[str, float]:
        """`images_per_s` by its name; nothing where an earlier process has made all steps of the epoch."""
        return {"images_per_s": self.images_per_s} if self._steps else {}

    def last_steps(self, left: int) -> dict[str, float]:
        """What the last steps say, for whoever watches: their speed, and how long the `left` ones take at it."""
        return {
            "images_per_s": self.images_per_s_last,
            "wait_share": self.wait_share_last,
            "left_s": self.left_s(left),
        }

    @property
    def images_per_s_last(self) -> float:
        """Of the last steps."""
        steps, seconds, _ = self._window()
        return steps * self._images / seconds if seconds > 0 else 0.0

    @property
    def wait_share_last(self) -> float:
        """Part of the time of the last steps in which the host waited for data."""
        _, seconds, waited_s = self._window()
        return waited_s / seconds if seconds > 0 else 0.0

    def left_s(self, steps: int) -> float:
        """How long so many steps take at the speed of the last ones."""
        done, seconds, _ = self._window()
        return steps * seconds / done if done else 0.0

    def _training_clock(self) -> float:
        """Seconds that stand still during validation and checkpoints."""
        return self._clock() - self._aside_s

    def _now(self) -> Look:
        return Look(self._steps, self._training_clock(), self._waited_s)

    def _window(self) -> Look:
        """The last steps: how many, their seconds, and of these the seconds waited for data."""
        then = self._looks[0]
        now = self._looks[-1] if len(self._looks) > 1 else self._now()
        return Look(now.steps - then.steps, now.at_s - then.at_s, now.waited_s - then.waited_s)

    def _figures(self) -> dict[str, float]:
        """This rank's figures of the epoch: of its steps only what this process has made."""
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
    """The meter of a training for the length of the block; `before` is what earlier processes have used."""
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
    """The first rank's figures, but the utilization's mean over ranks, and the most memory and waiting of any."""
    figures = dict(parts[0])
    for name in figures:
        every = [part[name] for part in parts if name in part]
        if name == "gpu_utilization":
            figures[name] = sum(every) / len(every)
        elif name.startswith(("gpu_", "data_wait_")):
            figures[name] = max(every)
    return figures
