"""Warns if a training is far slower than its network's benchmark on the same GPU, and names the likely reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medmamba.config import MedMambaConfig
from pipelines.placement import Placement
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.meter.bench_rows import BenchSpeed, find_reference, read_remembered
from pipelines.worker.meter.speed import LAST_STEPS

SLOW = 0.5  # of the benchmark
LONG_WAIT = 0.2  # of the time
IDLE_GPU = 0.7  # utilization
SMALL_MICRO_BATCH = 64


@dataclass
class SpeedCheck:
    """Called with the figures of each epoch; checks once, as soon as the speed has settled."""

    reference: BenchSpeed | None
    placement: Placement
    micro_batch: int
    _epochs: int = field(default=0, init=False)  # of this process
    _is_over: bool = field(default=False, init=False)

    def __call__(self, figures: Mapping[str, float]) -> str:
        """The warning; empty if the training is fast enough, nothing is comparable, or the check is done."""
        self._epochs += 1
        # The first steps of a process include start-up and compilation.
        is_settled = self._epochs > 1 or figures["step"] / figures["epoch"] >= 2 * LAST_STEPS
        is_measured = "images_per_s_last" in figures  # absent if an earlier process made all steps of the epoch
        if self.reference is None or self._is_over or not is_settled or not is_measured:
            return ""
        self._is_over = True
        expected, speed = self.reference.images_per_s * self.placement.workers, figures["images_per_s_last"]
        if speed >= SLOW * expected:
            return ""
        gpus = "this GPU" if self.placement.workers == 1 else f"{self.placement.workers} such GPUs"
        return (
            f"slow: {speed:,.0f} images/s, but {self.reference.network} at {self.reference.side} px reaches "
            f"{expected:,.0f} on {gpus}: {slow_reason(figures, self.placement, self.micro_batch)}"
        )


def slow_reason(figures: Mapping[str, float], placement: Placement, micro_batch: int) -> str:
    """The most likely bottleneck according to an epoch's figures, and its remedy."""
    waited = figures.get("data_wait_share_last", 0.0)
    if waited > LONG_WAIT:
        return (
            f"it waits for data {100 * waited:.0f} % of the time; give the loader more CPUs "
            f"(--placement.cpus-per-worker, now {placement.cpus_per_worker:g})"
        )
    if placement.compile == "off":
        return "the training step is not compiled (--placement.compile on, with another --run NAME)"
    if figures.get("gpu_utilization", 1.0) < IDLE_GPU and micro_batch < SMALL_MICRO_BATCH:
        return (
            f"the host cannot keep the GPU busy ({100 * figures['gpu_utilization']:.0f} %) with micro-batches of "
            f"{micro_batch}; use a recipe with a larger --train.micro-batch"
        )
    if placement.zero_stage > 0:
        return f"ZeRO stage {placement.zero_stage} costs more time than it saves; try --placement.zero-stage 0"
    return "medmamba train --profile with another --run NAME shows where the time goes"


def speed_check(config: TrainStepConfig, placement: Placement, gpu: str) -> SpeedCheck:
    """The check for a training on this GPU model; it never warns on a CPU (an empty name)."""
    train, reference = config.train, None
    if gpu and isinstance(config.model, MedMambaConfig):
        reference = find_reference(
            gpu, config.model.variant, side=train.image_size, precision=train.precision,
            micro_batch=train.micro_batch, remembered=read_remembered(),
        )  # fmt: skip
    return SpeedCheck(reference, placement, train.micro_batch)
