"""The files that a step writes to the store: config.json before its first byte, record.json after its last.

A failed step also has failure.json with the reason, until it runs again; that is not part of its identity.
"""

from __future__ import annotations

import contextlib
import functools
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from data_shards.renamed import new_words, part_of
from data_shards.store import Store, StoreError, StoreKeyError
from pipelines.override import difference, explain

CONFIG, RECORD, FAILURE = "config.json", "record.json", "failure.json"
STILL_TO_RUN = "still to run"


Kept = TypeVar("Kept")


class DriftError(ValueError):
    """A step of this name was started with another configuration or other inputs."""


@dataclass(frozen=True)
class Identity:
    """The identity of a step: its configuration and the digests of its inputs, but not its placement.

    A digest is None until the step that produces the input has run.
    """

    config: dict[str, Any]
    inputs: dict[str, str | None]


@dataclass(frozen=True)
class Record:
    """Marks a step as finished: its facts and their provenance. `placement` is empty if none was needed."""

    facts: dict[str, Any]
    inputs: dict[str, str | None]
    seconds: float
    started: str
    finished: str
    placement: dict[str, Any]
    git_commit: str
    packages: dict[str, str]


@dataclass(frozen=True)
class Failure:
    """Why a step failed, in one line, and when."""

    reason: str
    when: str


def write_failure(out: Store, reason: str) -> None:
    """Writes failure.json; if that fails (a full disk), the step counts as interrupted."""
    failure = Failure(reason, datetime.now(UTC).isoformat(timespec="seconds"))
    with contextlib.suppress(StoreError):
        out.put(FAILURE, to_json(asdict(failure)))


def read_failure(out: Store) -> Failure | None:
    """Why the step failed, if it has not run again since; None if it did not fail."""
    try:
        failure = Failure(**json.loads(out.get(FAILURE)))
    except StoreKeyError:
        return None
    except (ValueError, TypeError, RecursionError):
        return Failure("the stored reason is incomplete", "")
    if not all(isinstance(value, str) for value in asdict(failure).values()):
        return Failure("the stored reason was edited or damaged", "")
    return failure


def write_identity(out: Store, identity: Identity) -> None:
    """Writes config.json unless it exists (see `check_identity`), and deletes an earlier failure."""
    out.put(CONFIG, to_json(asdict(identity)), if_absent=True)
    out.delete(FAILURE)


def write_record(out: Store, record: Record) -> None:
    """Writes record.json: from now on the step is finished."""
    out.put(RECORD, to_json(asdict(record)))


def read_record(out: Store) -> Record | None:
    """The record of a finished step; None if it has not finished."""
    return _read(out, RECORD, Record) if out.head(RECORD) is not None else None


def read_identity(out: Store) -> Identity | None:
    """The identity that a step was started with; None if it was never started."""
    return _read(out, CONFIG, Identity) if out.head(CONFIG) is not None else None


def check_identity(step: str, begun: Identity, now: Identity, *, run: str, kind: type[BaseModel]) -> None:
    """Raises DriftError with every changed field, its old and new value, and what to do.

    `kind` is the configuration's model: a field that it gained after the step was started is compared at its default.
    An input whose digest is not known yet is compared later, but added and removed inputs are found now.
    """
    inputs = {name: digest or begun.inputs.get(name) or STILL_TO_RUN for name, digest in now.inputs.items()}
    old, new = _completed(begun.config, kind), new_words(json.loads(to_json(now.config)), part_of(kind))
    changed = difference({**old, "inputs": begun.inputs}, {**new, "inputs": inputs})
    if changed:
        fields = "; ".join(f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in changed.items())
        raise DriftError(
            f"step {step} of run {run!r} was started with another configuration ({fields}). "
            f"A run's name belongs to one configuration: use another name (--run NAME), or restore the old values"
        )


def _completed(config: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    try:
        checked = kind.model_validate(config)
    except ValidationError:  # a field was removed or changed its meaning: drift, reported field by field
        return new_words(config, part_of(kind))
    completed: dict[str, Any] = json.loads(to_json(checked.model_dump(mode="json")))
    return completed


def to_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, so that equal values are equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a numpy scalar
        return value.item()
    raise TypeError(f"{value!r} cannot be stored in a record, only JSON values can")


def _read(out: Store, key: str, kind: type[Kept]) -> Kept:
    data = out.get(key)
    try:
        found = kind(**json.loads(data))
        _adapter(kind).validate_json(data, strict=True)  # type: ignore[arg-type]
        return found
    except ValidationError as error:
        problem = explain(error)[:200]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
        problem = str(error)
    raise ValueError(
        f"{out.uri}/{key} is not a valid step file ({problem}): it was edited or damaged; "
        f"restore it, or delete the step's folder to run the step again"
    )


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
