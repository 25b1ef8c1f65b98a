"""Resources a training has used so far: time, images, GPU-seconds, energy.

It is part of every checkpoint (usage.json), so a resumed training adds to what earlier processes used.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_shards.fields import explained
from pipelines.worker.state import ResumeError

USAGE = "usage.json"


class Usage(BaseModel):
    """Sums over all processes of one training. Writing the checkpoint that contains it is not included."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    epochs: int = Field(0, ge=0)
    """Finished epochs in these figures."""
    images: int = Field(0, ge=0)
    """Images trained on, over all epochs."""
    wall_s: float = Field(0, ge=0)
    """Seconds since the start of the training loop, without starting the workers."""
    validation_s: float = Field(0, ge=0)
    checkpoint_s: float = Field(0, ge=0)
    steady_images: int = Field(0, ge=0)
    """Images of all epochs except the first of each process, which includes start-up and compilation."""
    steady_s: float = Field(0, ge=0)
    """Wall time of these epochs, including the gaps between them but not validation and checkpoints."""
    gpu_s: dict[str, float] = {}
    """GPU model -> seconds that such GPUs were held, summed over workers."""
    energy_j: float = Field(0, ge=0)
    """Joules the GPUs consumed according to NVML; 0 if unknown."""

    @property
    def images_per_s(self) -> float:
        """Sustained training speed: over the steady epochs, or over all training time before there is one."""
        if self.steady_s:
            return self.steady_images / self.steady_s
        trained_s = self.wall_s - self.validation_s - self.checkpoint_s
        return self.images / trained_s if trained_s > 0 else 0.0

    @property
    def gpu_hours(self) -> float:
        """Hours that GPUs were held, summed over workers; 0 on CPUs."""
        return sum(self.gpu_s.values()) / 3600

    @property
    def energy_kwh(self) -> float:
        """`energy_j` in kWh."""
        return self.energy_j / 3.6e6

    def plus(self, other: Usage) -> Usage:
        """The sum of both."""
        mine, theirs = self.model_dump(), other.model_dump()
        gpus = {name: self.gpu_s.get(name, 0) + other.gpu_s.get(name, 0) for name in {**self.gpu_s, **other.gpu_s}}
        return Usage(**{name: mine[name] + theirs[name] for name in mine if name != "gpu_s"}, gpu_s=gpus)


def usage_bytes(usage: Usage) -> bytes:
    """The usage.json of a checkpoint."""
    return usage.model_dump_json(indent=2).encode()


def read_usage(path: Path) -> Usage:
    """The usage in a usage.json; zeros if there is none, as in older checkpoints. Raises ResumeError if damaged."""
    if not path.is_file():
        return Usage()
    try:
        return Usage.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ResumeError(
            f"{USAGE} of the checkpoint is invalid ({explained(error)}); delete the folders `checkpoints` and `ray` of "
            "this step to train from the beginning, or use another --run NAME"
        ) from error
