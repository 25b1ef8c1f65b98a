"""The checkpoint: weights.safetensors and model.json for whoever uses the model; train.json and engine/ to resume."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.placement import Placement

BEST = "best"


class ResumeError(ValueError):
    """A checkpoint that cannot be continued exactly."""


@dataclass
class TrainState:
    """Where a training stands; everything else follows from it, the recipe and the weights."""

    epoch: int = 0
    """Epochs finished."""
    consumed: int = 0
    """Samples of the current epoch that were already used."""
    step: int = 0
    """Optimiser steps made."""
    best_epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the best epoch so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every finished epoch."""

    def is_better(self, metrics: dict[str, float]) -> bool:
        """Higher validation AUC; equal AUC: lower validation loss."""
        if not self.best:
            return True
        return (metrics["val_auc"], -metrics["val_loss"]) > (self.best["val_auc"], -self.best["val_loss"])


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of this rank's share of a checkpoint, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def write_state(
    folder: Path, state: TrainState, *, seed: int, placement: Placement, manifest: str, digests: dict[str, str]
) -> None:
    """Writes train.json, the last file of a checkpoint: it holds the `digests` of all others, of every rank."""
    described = {
        **asdict(state),
        "seed": seed,
        "ranks": placement.workers,
        "zero_stage": placement.zero_stage,
        "manifest": manifest,
        "digests": digests,
    }
    (folder / "train.json").write_text(json.dumps(described, indent=2, sort_keys=True))


def read_state(folder: Path, *, placement: Placement, manifest: str) -> TrainState:
    """Returns the state of the checkpoint in `folder`; raises ResumeError where going on could not be exact."""
    described = json.loads((folder / "train.json").read_text())
    check_resumable(described, placement=placement, manifest=manifest)
    for name, digest in described["digests"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ResumeError(
                f"{name} of the checkpoint of epoch {described['epoch']} is missing or has another digest than "
                f"train.json says: the checkpoint is damaged, and it is the only one; delete the folder `ray` of this "
                f"step to begin it again, or use another --run NAME"
            )
    return TrainState(**{name: described[name] for name in TrainState.__dataclass_fields__})


def check_resumable(described: dict[str, Any], *, placement: Placement, manifest: str) -> None:
    """Raises ResumeError where `described` (a train.json) was written under another world or for other data."""
    if described["manifest"] != manifest:
        raise ResumeError(
            f"the checkpoint was trained on manifest {described['manifest'][:12]}, this run has {manifest[:12]}; "
            f"give the new data a run of its own (--run NAME)"
        )
    then = (described["ranks"], described["zero_stage"])
    now = (placement.workers, placement.zero_stage)
    if then != now:
        raise ResumeError(
            f"the checkpoint of epoch {described['epoch']} was written by {then[0]} workers at ZeRO stage {then[1]}, "
            f"this placement has {now[0]} at stage {now[1]}: the optimiser state would not be exact. Resume with "
            f"--placement.workers {then[0]} --placement.zero-stage {then[1]}, or begin again with another --run NAME"
        )


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
