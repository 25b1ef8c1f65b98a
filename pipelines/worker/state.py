"""The progress of a training, and train.json, which stores it in a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from data_shards.fields import Sha256, explained
from data_shards.store import checked_key
from pipelines.placement import Placement

FORMAT = 1
"""Format of the train.json that this version writes. `format` and `digest` mean the same in every format."""
_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no such numbers
_WITH_FLOATS = ("losses", "unsent", "best", "history")  # the loss of a skipped step is NaN
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class ResumeError(ValueError):
    """A checkpoint that cannot be continued exactly."""


class NewerFormatError(ResumeError):
    """A checkpoint of a later version. It is not damaged, so an older one must not replace it."""


def rank(metrics: Mapping[str, float], prefix: str = "val_") -> tuple[float, float]:
    """Sort key for epochs, and for trials by their best epoch: higher AUC first, then lower loss."""
    return metrics[f"{prefix}auc"], -metrics[f"{prefix}loss"]


@dataclass
class TrainState:
    """The progress of a training; everything else follows from it, the recipe and the weights."""

    epoch: int = 0
    """Epochs finished."""
    consumed: int = 0
    """Samples of the current epoch already used."""
    step: int = 0
    """Optimizer steps made."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step of the current epoch."""
    best_epoch: int = 0
    best_step: int = 0
    """Steps made at the end of the best epoch; its checkpoint is named after this number."""
    best: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the best epoch so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every finished epoch."""
    unsent: list[dict[str, Any]] = field(default_factory=list)
    """Journal entries not yet recorded."""

    def is_stale(self, patience: int) -> bool:
        """Whether `patience` epochs have passed without a better one; 0: never."""
        return patience > 0 and self.epoch - self.best_epoch >= patience

    def is_better(self, metrics: dict[str, float]) -> bool:
        """Whether an epoch with these metrics is better than all before (`rank`)."""
        return not self.best or rank(metrics) > rank(self.best)

    def add(self, metrics: dict[str, float]) -> None:
        """Adds the metrics of the epoch that has just ended."""
        if self.is_better(metrics):
            self.best, self.best_epoch, self.best_step = metrics, self.epoch, self.step
        self.history.append(metrics)


class _Described(BaseModel):
    """The fields of a train.json to read. File names are checked because they become paths."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: Annotated[int, Field(ge=1)] = FORMAT
    epoch: _Count = 0
    consumed: _Count = 0
    step: _Count = 0
    losses: list[float] = []
    unsent: list[dict[str, Any]] = []
    best_epoch: _Count = 0
    best_step: _Count = 0
    best: dict[str, float] = {}
    history: list[dict[str, float]] = []
    ranks: Annotated[int, Field(ge=1)] = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    compile: Literal["on", "off"] = "off"
    flat: bool = False
    manifest: str = ""
    training: str = ""
    """`training_digest` of what was trained."""
    digests: dict[Annotated[str, AfterValidator(checked_key)], Sha256] = {}
    best_digests: dict[Literal["weights.safetensors", "model.json"], Sha256] = {}
    digest: Sha256 = ""
    """Digest of all other fields; absent in early checkpoints."""


def training_digest(config: BaseModel) -> str:
    """Identifies a training: sha256 of its configuration (model and train of a recipe)."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def describe(
    state: TrainState, *, seed: int, placement: Placement, manifest: str, training: str = ""
) -> dict[str, Any]:
    """The fields of train.json except the digests. `placement` is informative: a resume may use another one."""
    return {
        "format": FORMAT,
        **asdict(state),
        "seed": seed,
        "ranks": placement.workers,
        "zero_stage": placement.zero_stage,
        "compile": placement.compile,
        "manifest": manifest,
        "training": training,
    }


def described_bytes(described: Mapping[str, Any]) -> bytes:
    """The bytes of train.json: the fields and their digest. Non-finite numbers are written as strings."""
    named = {name: _by_name(value) for name, value in described.items()}
    written = {**named, "digest": _digest_of(named)}
    return json.dumps(written, indent=2, sort_keys=True, allow_nan=False).encode()


# Required in every train.json of the current checkpoint layout.
FIELDS = frozenset(_Described.model_fields) - {"flat", "format", "unsent"}


def read_described(data: bytes, *, remedy: str = "") -> dict[str, Any]:
    """Parses and checks a train.json.

    Raises ResumeError, which ends with `remedy`, if it was edited or damaged, and NewerFormatError if a later version
    wrote it.
    """
    remedy = remedy and f"; {remedy}"
    try:
        written = json.loads(data)
        _check_format(written)
        described = _with_numbers(written)
        _Described.model_validate(described)
    except NewerFormatError:
        raise
    except ValidationError as error:
        raise ResumeError(f"train.json cannot be used ({explained(error)}){remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ResumeError(f"train.json is damaged ({error}){remedy}") from error
    if "digest" in written and written["digest"] != _digest_of(written):
        raise ResumeError(f"train.json was edited or damaged after it was written: its digest does not match{remedy}")
    return described


def _check_format(written: Any) -> None:
    """Raises NewerFormatError for an intact train.json of a later version; if damaged, its digest does not match."""
    found = written.get("format") if isinstance(written, dict) else None
    if isinstance(found, int) and found > FORMAT and written.get("digest") == _digest_of(written):
        raise NewerFormatError(
            f"the checkpoint of step {written.get('step')} has format {found}, but this version only reads formats up "
            f"to {FORMAT}; resume with the version that wrote it, or use another --run NAME"
        )


def _by_name(value: Any) -> Any:
    """Replaces non-finite numbers in a JSON value by their names."""
    if isinstance(value, Mapping):
        return {key: _by_name(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_by_name(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _with_numbers(written: Any) -> Any:
    """Replaces the names of non-finite numbers in train.json's fields by numbers."""
    if not isinstance(written, dict):
        return written
    return {name: _numbers(value) if name in _WITH_FLOATS else value for name, value in written.items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return _NAMED.get(value, value) if isinstance(value, str) else value


def _digest_of(described: Mapping[str, Any]) -> str:
    """sha256 of all fields except the digest itself."""
    rest = {name: value for name, value in described.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def state_of(described: Mapping[str, Any]) -> TrainState:
    """The state that a train.json describes."""
    return TrainState(**{name: described[name] for name in TrainState.__dataclass_fields__ if name in described})


def check_same_data(described: Mapping[str, Any], manifest: str) -> None:
    """Raises ResumeError if the checkpoint was trained on other data."""
    if described["manifest"] != manifest:
        raise ResumeError(
            f"the checkpoint was trained on manifest {described['manifest'][:12]}, but this run has {manifest[:12]}; "
            f"use another --run NAME for the new data"
        )


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
