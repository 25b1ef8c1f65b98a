"""How and where: workers, processors, ZeRO stage, scan backend. Resolved once, recorded, never in an identity."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LEAST_CPUS = 0.25  # workers that share a core wait for each other at every collective


class PlacementConfig(BaseModel):
    """What a person may say about the placement; `auto` and 0 are resolved from what Ray has."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    workers: int = Field(0, ge=0)
    """Training workers. 0: one per GPU, or one with all CPUs where there is no GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live. auto: cuda where Ray has a GPU."""
    cpus_per_worker: float = Field(0, ge=0)
    """CPUs (and threads) of each training worker. 0: all CPUs of Ray, shared evenly, at most 8 beside a GPU."""
    zero_stage: Literal["auto", "0", "1", "2", "3"] = "auto"
    """DeepSpeed's ZeRO stage. auto: 1, or 0 for a single worker. 14-40 M parameters gain nothing from 3."""
    scan: str = "auto"
    """Backend of the selective scan. auto: the first that can run here; a named one that cannot is an error."""
    trials: int = Field(0, ge=0)
    """Trials of a sweep at once. 0: one per GPU, or one per CPU where there is no GPU."""


class Placement(BaseModel):
    """The resolved placement, as it stands in a step's record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int
    device: Literal["cpu", "cuda"]
    cpus_per_worker: float
    zero_stage: int
    scan: str
    trials: int
    nodes: int

    @property
    def backend(self) -> str:
        """The torch.distributed backend."""
        return "nccl" if self.device == "cuda" else "gloo"

    @property
    def threads(self) -> int:
        """Compute threads of one training worker."""
        return max(1, int(self.cpus_per_worker))

    def for_trial(self) -> Placement:
        """The placement inside one trial of a sweep: a world of one that shares the CPUs with the other trials."""
        cpus = self.cpus_per_worker * self.workers / self.trials
        # A trial holds a whole number of CPUs or, where trials outnumber CPUs, an even share of one.
        cpus = float(int(cpus)) if cpus >= 1 else cpus
        return self.model_copy(update={"workers": 1, "zero_stage": 0, "cpus_per_worker": cpus})


def resolve(config: PlacementConfig, *, num_cpus: float, num_gpus: float, nodes: int) -> Placement:
    """Returns the placement for a Ray with these resources.

    Raises ValueError (value, rule, remedy) where it is impossible, before any worker starts.
    """
    device = config.device if config.device != "auto" else ("cuda" if num_gpus >= 1 else "cpu")
    if device == "cuda" and num_gpus < 1:
        raise ValueError(
            "--placement.device cuda: this Ray has no GPU; start it on a machine with one, or leave the device on auto"
        )
    workers = config.workers or (int(num_gpus) if device == "cuda" else 1)
    if device == "cuda" and workers > num_gpus:
        raise ValueError(
            f"--placement.workers {workers}: one GPU per worker, and this Ray has {num_gpus:g}; "
            f"ask for at most {num_gpus:g}, or add nodes"
        )
    fair = num_cpus / workers if device == "cpu" else min(8.0, max(1.0, num_cpus / workers))
    # Half a CPU is a valid Ray request, so that two workers can be tried on a machine with one core.
    cpus = config.cpus_per_worker or (float(int(fair)) if fair >= 1 else math.floor(fair * 100) / 100)
    if cpus < LEAST_CPUS:
        raise ValueError(
            f"--placement.workers {workers}: {cpus:g} of the {num_cpus:g} CPUs of this Ray for each worker, but "
            f"at least {LEAST_CPUS:g} is needed; ask for fewer workers, or start Ray with more CPUs"
        )
    if cpus * workers > num_cpus:
        raise ValueError(
            f"--placement.workers {workers} x --placement.cpus-per-worker {cpus:g} = {workers * cpus:g} CPUs, "
            f"but this Ray has {num_cpus:g}; lower one of them, or start Ray with more CPUs"
        )
    stage = int(config.zero_stage) if config.zero_stage != "auto" else (1 if workers > 1 or device == "cuda" else 0)
    trials = config.trials or (int(num_gpus) if device == "cuda" else max(1, int(num_cpus)))
    if device == "cuda" and trials > num_gpus:
        raise ValueError(
            f"--placement.trials {trials}: one GPU per trial, and this Ray has {num_gpus:g}; ask for fewer"
        )
    return Placement(
        workers=workers,
        device=device,
        cpus_per_worker=cpus,
        zero_stage=stage,
        scan=config.scan,
        trials=trials,
        nodes=nodes,
    )
