"""The checkpoint: weights.safetensors and model.json for whoever uses the model; train.json and engine/ to resume."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from data_shards.fields import Sha256, explained
from data_shards.store import checked_key
from pipelines.placement import Placement

BEST = "best"
_AGAIN = "delete the folder `ray` of this step to begin it again, or use another --run NAME"
_NEWER = ("digest", "compile", "flat")  # fields that checkpoints of earlier versions do not have
_Whole = Annotated[int, Field(ge=0, lt=1 << 53)]


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


class _Described(BaseModel):
    """The fields of a train.json that is read; the names of files become paths."""

    model_config = ConfigDict(strict=True, extra="allow")

    epoch: _Whole = 0
    consumed: _Whole = 0
    step: _Whole = 0
    best_epoch: _Whole = 0
    best: dict[str, float] = {}
    history: list[dict[str, float]] = []
    ranks: Annotated[int, Field(ge=1)] = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    compile: Literal["on", "off"] = "off"
    flat: bool = False
    manifest: str = ""
    digests: dict[Annotated[str, AfterValidator(checked_key)], Sha256] = {}
    digest: Sha256 = ""
    """Of all the rest. Checkpoints from before there was one have none."""


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of this rank's share of a checkpoint, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def write_state(
    folder: Path, state: TrainState, *, seed: int, placement: Placement, manifest: str, digests: dict[str, str]
) -> None:
    """Writes train.json, the last file of a checkpoint: the `digests` of all others, of every rank, and its own."""
    described = {
        **asdict(state),
        "seed": seed,
        "ranks": placement.workers,
        "zero_stage": placement.zero_stage,
        "compile": placement.compile,
        "flat": placement.flat,
        "manifest": manifest,
        "digests": digests,
    }
    described["digest"] = _digest_of(described)
    (folder / "train.json").write_text(json.dumps(described, indent=2, sort_keys=True))


def read_described(data: bytes, *, remedy: str = _AGAIN) -> dict[str, Any]:
    """The fields of a train.json; raises ResumeError where it was edited or damaged."""
    try:
        described = json.loads(data)
        _Described.model_validate(described)
    except ValidationError as error:
        raise ResumeError(f"train.json of the checkpoint cannot be used ({explained(error)}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ResumeError(f"train.json of the checkpoint is torn ({error}): {remedy}") from error
    if "digest" in described and described["digest"] != _digest_of(described):
        raise ResumeError(
            f"train.json of the checkpoint of epoch {described['epoch']} was edited or damaged after it was written: "
            f"its digest is that of other values; {remedy}"
        )
    return described


def as_written(placement: Placement, folder: Path) -> Placement:
    """The placement with what a training that resumes keeps of its checkpoint in `folder`: whether its parameters are
    flat, and whether it was compiled where nobody has named that."""
    described = read_described((folder / "train.json").read_bytes())
    kept: dict[str, Any] = {"flat": described.get("flat", False)}
    if placement.compile == "auto":
        kept["compile"] = described.get("compile", "off")
    return placement.model_copy(update=kept)


def _digest_of(described: dict[str, Any]) -> str:
    """sha256 of all fields but the digest itself."""
    rest = {name: value for name, value in described.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path, *, placement: Placement, manifest: str) -> TrainState:
    """Returns the state of the checkpoint in `folder`; raises ResumeError where going on could not be exact."""
    described = read_described((folder / "train.json").read_bytes())
    check_resumable(described, placement=placement, manifest=manifest)
    for name, digest in described["digests"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ResumeError(
                f"{name} of the checkpoint of epoch {described['epoch']} is missing or has another digest than "
                f"train.json says: the checkpoint is damaged, and it is the only one; {_AGAIN}"
            )
    return TrainState(**{name: described[name] for name in TrainState.__dataclass_fields__})


def check_resumable(described: dict[str, Any], *, placement: Placement, manifest: str) -> None:
    """Raises ResumeError where `described` (a train.json) was written under another world or for other data."""
    missing = [name for name in _Described.model_fields if name not in described and name not in _NEWER]
    if missing:
        raise ResumeError(f"train.json of the checkpoint has no {', '.join(missing)}: it was edited; {_AGAIN}")
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
