"""What a training has used so far: time, images, GPU-seconds, energy. It is part of every checkpoint (usage.json), so a
resumed training adds to what the processes before it have used."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_shards.fields import explained
from pipelines.worker.state import ResumeError

USAGE = "usage.json"


class Usage(BaseModel):
    """Sums over all processes that worked on one training; of the last checkpoint, its own writing is not counted."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    epochs: int = Field(0, ge=0)
    """Epochs that these figures are of."""
    images: int = Field(0, ge=0)
    """Images trained on, over all epochs."""
    wall_s: float = Field(0, ge=0)
    """From the start of the training loop on; starting the workers is not counted."""
    validation_s: float = Field(0, ge=0)
    checkpoint_s: float = Field(0, ge=0)
    steady_images: int = Field(0, ge=0)
    """Images of all epochs but the first of each process, in which workers start up and compile."""
    steady_s: float = Field(0, ge=0)
    """Wall time of these epochs, the boundaries between them included, validation and checkpoints not."""
    gpu_s: dict[str, float] = {}
    """Name of a GPU -> seconds for which such GPUs were held, summed over workers."""
    energy_j: float = Field(0, ge=0)
    """What NVML says the GPUs consumed; 0 where it does not."""

    @property
    def images_per_s(self) -> float:
        """The sustained speed: of the steady epochs; where there is none yet, of all of the training part."""
        if self.steady_s:
            return self.steady_images / self.steady_s
        trained_s = self.wall_s - self.validation_s - self.checkpoint_s
        return self.images / trained_s if trained_s > 0 else 0.0

    @property
    def gpu_hours(self) -> float:
        """Hours for which GPUs were held, over all workers; 0 on CPUs."""
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
    """The usage in a usage.json; nothing where the checkpoint was written before there was one. Raises ResumeError on
    damage."""
    if not path.is_file():
        return Usage()
    try:
        return Usage.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ResumeError(
            f"{USAGE} of the checkpoint cannot be used ({explained(error)}): delete the folders `checkpoints` and "
            "`ray` of this step to train again, or use another --run NAME"
        ) from error
