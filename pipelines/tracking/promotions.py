"""The log of a model's promotions in the store, which determines where the alias must point.

MLflow has no compare-and-set for aliases. Each move is therefore logged before it is made, under the number of the
lease that protects it, and marked as moved once the alias was read back with the lease still held.

Guarantees for processes that hold the model's lease:
- The alias moves from exactly the champion that the decision was made against, because nobody else moves it.
- A process that loses its lease (paused, or cut off from the store) notices before it moves the alias, and decides
  again.

A lease cannot prevent that a process is paused between its last check and its request, or that MLflow executes a
request late, and so overwrites a successor's move. In that case:
- When the process continues, it notices the lost lease, takes it again, moves the alias back to the last promotion,
  and decides again against that champion.
- If it is killed first, the next holder of the model's lease moves the alias back.
- Until then (milliseconds in the first case) `predict` uses the version that was written late.
A move whose process was killed may still be in progress in MLflow; its successor waits IN_FLIGHT_S for it.
An alias that a user moves in MLflow stays there, and the next version is compared with that champion.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from data_shards.store import Store, StoreKeyError
from data_shards.store.fenced_lease import FencedLease, is_held
from data_shards.store.holder import Holder, this_process
from pipelines.tracking.leases import Driver, model_lease_key
from pipelines.tracking.registry import Version, by_alias, by_number, move_alias
from pipelines.tracking.runs import IN_FLIGHT_S, RECENT_S

MOVE_S = 20.0  # longer than MLflow's client retries moving an alias
State = Literal["begun", "moved", "void"]


@dataclass(frozen=True)
class Promotion:
    """One move of the alias. Its state is begun, then moved, or void if its process died before the move."""

    number: int
    decision: dict[str, Any]
    record: str
    holder: Holder
    state: State = "begun"

    @property
    def version(self) -> int:
        """The version that the alias is moved to."""
        return int(self.decision["version"])


class Promotions:
    """The promotions of one alias of a registered model, under its lease `held`; `created` is from `bind_model`."""

    def __init__(self, context: Driver, held: FencedLease, *, model: str, alias: str, created: int) -> None:
        self._store, self._tracking, self._show = context.store, context.tracking, context.show
        self._held, self._model, self._alias = held, model, alias
        self._prefix = f"promotions/{model}/{created}/{alias}"

    def move(self, candidate: Version, decision: dict[str, Any], record: str, *, begun: list[Promotion]) -> None:
        """Moves the alias to `candidate`, according to `decision` of the step `record`.

        `begun` contains the promotion while it is in progress; if this raises, a promotion left in it may have been
        made.

        Raises:
            LostLeaseError: Another process has the lease, possibly since before the move.
            AliasMovedError: Someone without the lease moved the alias at the same time.
        """
        begun.append(self._write(Promotion(self._held.number, decision, record, this_process())))
        self._held.check(for_s=MOVE_S)
        move_alias(self._tracking, candidate, self._alias)
        self._held.check()
        self._write(replace(begun.pop(), state="moved"))

    def carried_out(self, version: int, record: str) -> dict[str, Any] | None:
        """The decision of the step `record` that moved the alias to `version`; None if there is none."""
        found = [each for each in self._all() if each.version == version and each.record == record]
        return found[-1].decision if found else None

    def champion(self, *, begun: list[Promotion]) -> Version | None:
        """The version that the alias points to, after settling moves that earlier processes left unfinished.

        `begun` are this process's own moves under an earlier lease, which are no longer in progress.
        """
        made = self._all()
        now = self._settled(made, {promotion.number for promotion in begun})
        last = max((each for each in made if each.state == "moved"), key=lambda each: each.number, default=None)
        # An earlier move that was never confirmed may have been executed late and overwritten the last one.
        late = [each for each in made if last and each.state == "begun" and each.number < last.number]
        if last is not None and not _is_at(now, last) and any(_is_at(now, each) for each in late):
            now = self._put_back(last, now)
        while begun:
            self._write(replace(begun.pop(), state="void"))
        for promotion in late:
            if promotion.holder.is_dead:  # it can no longer move the alias
                self._write(replace(promotion, state="void"))
        return now

    def _put_back(self, last: Promotion, now: Version | None) -> Version | None:
        back = by_number(self._tracking, self._model, last.version)
        if back is None or now is None:
            return now
        self._held.check(for_s=MOVE_S)
        move_alias(self._tracking, back, self._alias)
        self._show.say(
            f"a process that was paused or killed had moved the alias {self._alias} of {self._model} to version "
            f"{now.number}; it is back at version {back.number}, which was promoted later"
        )
        return back

    def _settled(self, made: list[Promotion], own: set[int]) -> Version | None:
        """Waits for a move that may be in progress and records its outcome; returns where the alias points."""
        newest = made[-1] if made and made[-1].state == "begun" and made[-1].number not in own else None
        now = by_alias(self._tracking, self._model, self._alias)
        if newest is None:
            return now
        is_recent = self._store.age_s(self._key(newest.number)) < RECENT_S
        until = time.monotonic() + (IN_FLIGHT_S if is_recent else 0.0)
        while not _is_at(now, newest) and time.monotonic() < until:
            time.sleep(0.5)
            now = by_alias(self._tracking, self._model, self._alias)
        if newest.holder.is_dead:  # a paused holder could still move the alias later
            made[-1] = self._write(replace(newest, state="moved" if _is_at(now, newest) else "void"))
        return now

    def _all(self) -> list[Promotion]:
        return [_read(self._store, key) for key in self._store.list(f"{self._prefix}/")]

    def _write(self, promotion: Promotion) -> Promotion:
        self._store.put(self._key(promotion.number), json.dumps(asdict(promotion), indent=1).encode() + b"\n")
        return promotion

    def _key(self, number: int) -> str:
        return f"{self._prefix}/{number:08d}.json"


def abandoned_moves(store: Store) -> dict[str, str]:
    """Moves that were begun but never confirmed and whose lease is over: the step's folder -> a sentence about it.

    The next promotion checks whether the alias was moved.
    """
    found = {}
    for key in store.list("promotions/"):
        with contextlib.suppress(ValueError, StoreKeyError):  # not a promotion, or damaged: the next promotion raises
            _, *model, _, alias, _ = key.split("/")
            each = _read(store, key)
            if each.state == "begun" and not is_held(store, model_lease_key("/".join(model)), each.number):
                found["/".join(each.record.split("/")[-3:])] = (
                    f"{each.holder} ended while moving the alias {alias} of {'/'.join(model)} to version "
                    f"{each.version}; the next promotion checks whether it was moved"
                )
    return found


def _read(store: Store, key: str) -> Promotion:
    try:
        found = json.loads(store.get(key))
        return Promotion(**{**found, "holder": Holder(**found["holder"])})
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{store.uri}/{key} was edited or damaged ({error}): restore it, or delete it if the alias in MLflow is "
            "correct"
        ) from None


def _is_at(now: Version | None, promotion: Promotion) -> bool:
    return now is not None and now.number == promotion.version
