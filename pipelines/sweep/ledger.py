"""The state of a sweep in the store: `trials/<number>.json` for each trial that has begun, written by the driver alone.

Ray Tune's own state is pickled, and whoever writes to the store could make it run code: it is never kept there.
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
OVER: tuple[State, ...] = ("ended", "stopped", "diverged")  # the others are continued when the sweep resumes
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, lt=1 << 53)]


class TrialEpoch(BaseModel):
    """A finished epoch of a trial, as its trial reported it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    order: _Count
    """Which of the sweep's reports it was: in this order ASHA saw them."""
    metrics: dict[str, _Finite]

    @model_validator(mode="after")
    def _comparable(self) -> TrialEpoch:
        if missing := {"val_auc", "val_loss"} - self.metrics.keys():
            raise ValueError(f"an epoch without {', '.join(sorted(missing))}")
        if not 0 <= self.metrics["val_auc"] <= 1:
            raise ValueError(f"val_auc {self.metrics['val_auc']:g} is not from 0 to 1")
        return self


class TrialRecord(BaseModel):
    """A trial of a sweep: what it tries, and how far it is."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    number: _Count
    """Which of the sweep's trials it is, counted from 1."""
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    """What its run in MLflow and its checkpoints are found by."""
    overrides: dict[str, int | _Finite]
    """Dotted key of the recipe -> value."""
    epochs: tuple[TrialEpoch, ...] = ()
    state: State = "running"
    """ended: trained to its last epoch, or to where its own patience ended. stopped: by ASHA. diverged: a result as
    well. failed: for another reason, so it is tried again when the sweep resumes."""
    reason: str = ""
    """Why it diverged or failed."""

    @model_validator(mode="after")
    def _possible(self) -> TrialRecord:
        orders = [epoch.order for epoch in self.epochs]
        if orders != sorted(set(orders)):
            raise ValueError("its epochs are not in the order in which they were reported")
        if self.state in ("ended", "stopped") and not self.epochs:
            raise ValueError(f"it is {self.state}, but has no epoch")
        return self

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.state in OVER

    @property
    def last(self) -> Mapping[str, float]:
        """The metrics of its last epoch; empty before the first."""
        return self.epochs[-1].metrics if self.epochs else {}

    @property
    def best(self) -> Mapping[str, float]:
        """The metrics of its best epoch (`rank`), whatever came after it; empty before the first."""
        return max((each.metrics for each in self.epochs), key=rank, default={})


class Ledger:
    """The trials of a sweep, in memory and in the store below `out`, in the order of their numbers."""

    def __init__(self, out: Store, *, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises where this driver does not hold the run any more: it then writes nothing."""
        self._out, self._check = out, check
        self._records: dict[int, TrialRecord] = {}
        self.broken: Exception | None = None
        """Why the last write failed, once one has."""

    def read(self, fits: Callable[[TrialRecord], str], say: Callable[[str], None]) -> None:
        """Takes over what an earlier driver wrote. `fits` returns why a record is not one of this sweep, or nothing.

        A record that was edited or damaged is ignored, and `say` gets a line: its trial begins again.
        """
        for key in sorted(self._out.list(f"{TRIALS}/")):
            name = key.removeprefix(f"{TRIALS}/")
            if "/" in name or not name.endswith(".json"):
                continue
            record, problem = _parsed(self._out.get(key))
            if record is not None:
                problem = self._misfit(record, name) or fits(record)
            if problem or record is None:
                say(f"{self._out.uri}/{key} was edited or damaged ({problem}): its trial begins again")
            else:
                self._records[record.number] = record

    def records(self) -> list[TrialRecord]:
        """All trials that have begun, by number."""
        return [self._records[number] for number in sorted(self._records)]

    def over(self) -> list[TrialRecord]:
        """The trials of which nothing is left to do, by number."""
        return [record for record in self.records() if record.is_over]

    def to_do(self, trials: int) -> list[int]:
        """Numbers of the trials that are left of so many: those begun and not over first, then new ones."""
        begun = [record.number for record in self.records() if not record.is_over]
        return begun + [number for number in range(1, trials + 1) if number not in self._records]

    def begin(self, number: int, choose: Callable[[], Mapping[str, Any]]) -> TrialRecord:
        """A trial that starts: its record where it had begun before, else a new one with the overrides of `choose`."""
        known = self._records.get(number)
        if known is not None:
            return self._keep(known.model_copy(update={"state": "running", "reason": ""}))
        return self._keep(TrialRecord(number=number, id=secrets.token_hex(4), overrides=dict(choose())))

    def add_epoch(self, number: int, metrics: Mapping[str, float], state: State) -> None:
        """A finished epoch of a trial, and the state the trial is in after it: one write, so that a driver that is
        killed has decided both or neither. An epoch that is known already changes nothing."""
        record = self._records[number]
        if metrics["epoch"] <= len(record.epochs):
            return
        assert metrics["epoch"] == len(record.epochs) + 1, f"trial {number} left out an epoch"
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        order = 1 + max((each.order for one in self._records.values() for each in one.epochs), default=0)
        epoch = TrialEpoch(order=order, metrics=finite)
        self._keep(record.model_copy(update={"epochs": (*record.epochs, epoch), "state": state}))

    def end(self, number: int, state: State, reason: str = "") -> None:
        """Writes how a trial ended, unless it is over already."""
        record = self._records[number]
        if not record.is_over:
            self._keep(record.model_copy(update={"state": state, "reason": reason}))

    def events(self) -> Iterator[tuple[TrialRecord, int]]:
        """Each recorded epoch (a record, and the epoch's number from 1) in the order in which they were reported."""
        of = [(each.order, record, epoch) for record in self.records() for epoch, each in enumerate(record.epochs, 1)]
        for _, record, epoch in sorted(of, key=lambda event: (event[0], event[1].number, event[2])):
            yield record, epoch

    def delete_checkpoints(self) -> None:
        """Deletes what the trials kept to resume from: the sweep has ended."""
        for key in list(self._out.list(f"{TRIALS}/")):
            if "/" in key.removeprefix(f"{TRIALS}/"):
                self._out.delete(key)

    def _misfit(self, record: TrialRecord, name: str) -> str:
        if name != f"{record.number}.json":
            return f"it is of trial {record.number}"
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
    """What users read: "trial 3/8"; its id where the record of an earlier version does not say which one it is."""
    return f"trial {number}/{trials}" if number else f"trial {trial_id}"


def checkpoint_folder(out: Store, trial_id: str) -> Store:
    """Where a trial keeps its checkpoints."""
    return out.at(TRIALS, trial_id)


def _parsed(data: bytes) -> tuple[TrialRecord | None, str]:
    """The record in a file, or why there is none."""
    try:
        json.loads(data)  # pydantic's own parser says less about where a file breaks off
        return TrialRecord.model_validate_json(data), ""
    except ValidationError as error:
        return None, explained(error)
    except (ValueError, RecursionError) as error:
        return None, f"{type(error).__name__}"
