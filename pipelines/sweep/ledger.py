"""The state of a sweep in the store: `trials/<number>.json` for each trial that has started, written by the driver.

Ray Tune's own state is never stored: it is pickled, so anyone with write access to the store could execute code.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_shards.fields import explained
from data_shards.store import Store, StoreError
from pipelines.flow.record import to_json
from pipelines.worker.state import rank

TRIALS = "trials"
State = Literal["running", "ended", "stopped", "diverged", "failed"]
OVER: tuple[State, ...] = ("ended", "stopped", "diverged")  # trials in other states continue when the sweep resumes
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, lt=1 << 53)]


class TrialEpoch(BaseModel):
    """A finished epoch as its trial reported it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    order: _Count
    """Position among all reports of the sweep, which is the order in which ASHA saw them."""
    metrics: dict[str, _Finite]

    @model_validator(mode="after")
    def _comparable(self) -> TrialEpoch:
        if missing := {"val_auc", "val_loss"} - self.metrics.keys():
            raise ValueError(f"an epoch lacks {', '.join(sorted(missing))}")
        if not 0 <= self.metrics["val_auc"] <= 1:
            raise ValueError(f"val_auc {self.metrics['val_auc']:g} is not between 0 and 1")
        return self


class TrialRecord(BaseModel):
    """A trial of a sweep: its hyperparameters and its progress."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    number: _Count
    """Its number in the sweep, from 1."""
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    """Identifies its MLflow run and its checkpoints."""
    overrides: dict[str, int | _Finite]
    """Dotted key of the recipe -> value."""
    epochs: tuple[TrialEpoch, ...] = ()
    state: State = "running"
    """ended: trained to its last epoch or stopped early by its own patience. stopped: by ASHA. diverged: counts as a
    result. failed: for another reason; it is retried when the sweep resumes."""
    reason: str = ""
    """Why it diverged or failed."""

    @model_validator(mode="after")
    def _possible(self) -> TrialRecord:
        orders = [epoch.order for epoch in self.epochs]
        if orders != sorted(set(orders)):
            raise ValueError("its epochs are not in the order in which they were reported")
        if self.state in ("ended", "stopped") and not self.epochs:
            raise ValueError(f"its state is {self.state}, but it has no epochs")
        return self

    @property
    def is_over(self) -> bool:
        """Whether the trial is complete."""
        return self.state in OVER

    @property
    def last(self) -> Mapping[str, float]:
        """The metrics of its last epoch; empty before the first."""
        return self.epochs[-1].metrics if self.epochs else {}

    @property
    def best(self) -> Mapping[str, float]:
        """The metrics of its best epoch by `rank`; empty before the first."""
        return max((each.metrics for each in self.epochs), key=rank, default={})


class Ledger:
    """The trials of a sweep by number, in memory and in the store below `out`."""

    def __init__(self, out: Store, *, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called before each write and raises if this driver no longer holds the run."""
        self._out, self._check = out, check
        self._records: dict[int, TrialRecord] = {}
        self.broken: Exception | None = None
        """The error of the last failed write."""

    def read(self, fits: Callable[[TrialRecord], str], say: Callable[[str], None]) -> None:
        """Loads the records that an earlier driver wrote.

        `fits` returns why a record does not belong to this sweep, or "". A record that does not fit or is damaged is
        ignored with a line to `say`, and its trial starts again.
        """
        for key in sorted(self._out.list(f"{TRIALS}/")):
            name = key.removeprefix(f"{TRIALS}/")
            if "/" in name or not name.endswith(".json"):
                continue
            record, problem = _parsed(self._out.get(key))
            if record is not None:
                problem = self._misfit(record, name) or fits(record)
            if problem or record is None:
                say(f"{self._out.uri}/{key} was edited or damaged ({problem}); its trial starts again")
            else:
                self._records[record.number] = record

    def records(self) -> list[TrialRecord]:
        """All trials that have started, by number."""
        return [self._records[number] for number in sorted(self._records)]

    def over(self) -> list[TrialRecord]:
        """The complete trials, by number."""
        return [record for record in self.records() if record.is_over]

    def to_do(self, trials: int) -> list[int]:
        """Numbers of the trials left to run out of `trials`: first those started but not complete, then new ones."""
        begun = [record.number for record in self.records() if not record.is_over]
        return begun + [number for number in range(1, trials + 1) if number not in self._records]

    def begin(self, number: int, choose: Callable[[], Mapping[str, Any]]) -> TrialRecord:
        """Starts a trial: returns its existing record, or a new one with the overrides from `choose`."""
        known = self._records.get(number)
        if known is not None:
            return self._keep(known.model_copy(update={"state": "running", "reason": ""}))
        return self._keep(TrialRecord(number=number, id=secrets.token_hex(4), overrides=dict(choose())))

    def add_epoch(self, number: int, metrics: Mapping[str, float], state: State) -> None:
        """Records a finished epoch together with the trial's new state; ignores an epoch that is already recorded.

        Both go into one write, so that a killed driver stores both or neither.
        """
        record = self._records[number]
        if metrics["epoch"] <= len(record.epochs):
            return
        assert metrics["epoch"] == len(record.epochs) + 1, f"trial {number} skipped an epoch"
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        order = 1 + max((each.order for one in self._records.values() for each in one.epochs), default=0)
        epoch = TrialEpoch(order=order, metrics=finite)
        self._keep(record.model_copy(update={"epochs": (*record.epochs, epoch), "state": state}))

    def end(self, number: int, state: State, reason: str = "") -> None:
        """Records how a trial ended, unless it is already complete."""
        record = self._records[number]
        if not record.is_over:
            self._keep(record.model_copy(update={"state": state, "reason": reason}))

    def events(self) -> Iterator[tuple[TrialRecord, int]]:
        """Yields each recorded epoch as (record, epoch number from 1), in the order of the reports."""
        of = [(each.order, record, epoch) for record in self.records() for epoch, each in enumerate(record.epochs, 1)]
        for _, record, epoch in sorted(of, key=lambda event: (event[0], event[1].number, event[2])):
            yield record, epoch

    def delete_checkpoints(self) -> None:
        """Deletes the trials' checkpoints once the sweep has ended."""
        for key in list(self._out.list(f"{TRIALS}/")):
            if "/" in key.removeprefix(f"{TRIALS}/"):
                self._out.delete(key)

    def _misfit(self, record: TrialRecord, name: str) -> str:
        if name != f"{record.number}.json":
            return f"it belongs to trial {record.number}"
        if any(record.id == other.id for other in self._records.values()):
            return "another trial has its id"
        return ""

    def _keep(self, record: TrialRecord) -> TrialRecord:
        try:
            self._check()
            self._out.put(f"{TRIALS}/{record.number}.json", to_json(record.model_dump()))
        except StoreError as error:
            self.broken = error
            raise
        self._records[record.number] = record
        return record


def trial_name(number: int, trials: int, trial_id: str = "") -> str:
    """The name shown to users: "trial 3/8", or its id if `number` is 0, as in records of earlier versions."""
    return f"trial {number}/{trials}" if number else f"trial {trial_id}"


def checkpoint_folder(out: Store, trial_id: str) -> Store:
    """The folder of a trial's checkpoints."""
    return out.at(TRIALS, trial_id)


def _parsed(data: bytes) -> tuple[TrialRecord | None, str]:
    """Returns (record, ""), or (None, why it is invalid)."""
    try:
        json.loads(data)  # raises a more specific error for truncated JSON than pydantic
        return TrialRecord.model_validate_json(data), ""
    except ValidationError as error:
        return None, explained(error)
    except (ValueError, RecursionError) as error:
        return None, f"{type(error).__name__}"
