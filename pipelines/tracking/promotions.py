"""The promotions of a model in the order in which they were made, kept in the store: what the alias must point to.

MLflow cannot move an alias only if it is still where it was. So each move is noted before it is made, under the number
of the lease that it is made under, and marked as moved after the alias was read again with the lease still held.

What this guarantees, for processes that hold the model's lease:
- An alias is moved from the champion that the decision was made against, because nobody else moves it meanwhile.
- A process that is paused, or cut off from the store, for so long that another takes its lease finds out before it
  moves the alias, and decides again.

What no lease can prevent: a process that is paused between its last look at the lease and the sending of its request,
or a request that MLflow carries out late, overwrites the alias that a successor has moved. Then:
- the process itself, once it continues, finds that it has lost the lease, takes it again, puts the alias back to where
  the last promotion had moved it, and decides again against that champion;
- if it is killed before, the next process that holds the model's lease puts it back;
- until then, which is milliseconds in the first case, `predict` uses the version that was written late.
A move whose process was killed may still be under way in MLflow: its successor waits IN_FLIGHT_S for it.
An alias that a person moves in MLflow is left where it is, and is the champion that the next version is compared with.
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

MOVE_S = 20.0  # the lease must last for longer than MLflow's client tries to move an alias
State = Literal["begun", "moved", "void"]


@dataclass(frozen=True)
class Promotion:
    """One move of the alias: begun, then moved, or void where its process died before it was made."""

    number: int
    decision: dict[str, Any]
    record: str
    holder: Holder
    state: State = "begun"

    @property
    def version(self) -> int:
        """The version that the alias is moved to."""
        return self.decision["version"]


class Promotions:
    """The promotions of one alias of one registered model (`created`: when), under the model's lease `held`."""

    def __init__(self, context: Driver, held: FencedLease, *, model: str, alias: str, created: int):
        self._store, self._tracking, self._show = context.store, context.tracking, context.show
        self._held, self._model, self._alias = held, model, alias
        self._prefix = f"promotions/{model}/{created}/{alias}"

    def move(self, candidate: Version, decision: dict[str, Any], record: str, *, begun: list[Promotion]) -> None:
        """Points the alias to `candidate`, as `decision` of the step `record` says.

        `begun` holds the promotion while it is under way: what is left in it when this raises may have been made.

        Raises:
            LostLeaseError: another process has the lease, perhaps since before the alias was moved.
            AliasMovedError: somebody who holds no lease moved the alias at the same moment.
        """
        begun.append(self._write(Promotion(self._held.number, decision, record, this_process())))
        self._held.check(for_s=MOVE_S)
        move_alias(self._tracking, candidate, self._alias)
        self._held.check()
        self._write(replace(begun.pop(), state="moved"))

    def carried_out(self, version: int, record: str) -> dict[str, Any] | None:
        """The decision of the step `record` that moved the alias to `version`, None where there is none."""
        found = [each for each in self._all() if each.version == version and each.record == record]
        return found[-1].decision if found else None

    def champion(self, *, begun: list[Promotion]) -> Version | None:
        """The version that the alias points to, once what earlier processes left has been settled.

        `begun` is what this process itself had begun under an earlier lease: nothing of it is under way any more.
        """
        made = self._all()
        now = self._settled(made, {promotion.number for promotion in begun})
        last = max((each for each in made if each.state == "moved"), key=lambda each: each.number, default=None)
        # A move begun before the last one, and never seen to be made, may have overwritten it.
        late = [each for each in made if last and each.state == "begun" and each.number < last.number]
        if last is not None and not _is_at(now, last) and any(_is_at(now, each) for each in late):
            now = self._put_back(last, now)
        while begun:
            self._write(replace(begun.pop(), state="void"))
        for promotion in late:
            if promotion.holder.is_dead:  # from now on only a person moves the alias there
                self._write(replace(promotion, state="void"))
        return now

    def _put_back(self, last: Promotion, now: Version | None) -> Version | None:
        back = by_number(self._tracking, self._model, last.version)
        if back is None or now is None:
            return now
        self._held.check(for_s=MOVE_S)
        move_alias(self._tracking, back, self._alias)
        self._show.say(
            f"the alias {self._alias} of {self._model} had been moved to version {now.number} by a process that was "
            f"paused or killed meanwhile; it is at version {back.number} again, which was promoted after that"
        )
        return back

    def _settled(self, made: list[Promotion], own: set[int]) -> Version | None:
        """Where the alias points to, after waiting for a move that may be under way; marks what became of it."""
        newest = made[-1] if made and made[-1].state == "begun" and made[-1].number not in own else None
        now = by_alias(self._tracking, self._model, self._alias)
        if newest is None:
            return now
        is_recent = self._store.age_s(self._key(newest.number)) < RECENT_S
        until = time.monotonic() + (IN_FLIGHT_S if is_recent else 0.0)
        while not _is_at(now, newest) and time.monotonic() < until:
            time.sleep(0.5)
            now = by_alias(self._tracking, self._model, self._alias)
        if newest.holder.is_dead:  # else it may still be paused, and move the alias later
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
    """Which moves of an alias were begun and are not under way any more: the step's folder -> what was begun by whom.

    The lease that each was made under is over. Nobody has seen whether the alias was moved: the next promotion looks.
    """
    found = {}
    for key in store.list("promotions/"):
        with contextlib.suppress(ValueError, StoreKeyError):  # not a promotion's; or damaged, as the next one says
            _, *model, _, alias, _ = key.split("/")
            each = _read(store, key)
            if each.state == "begun" and not is_held(store, model_lease_key("/".join(model)), each.number):
                found["/".join(each.record.split("/")[-3:])] = (
                    f"{each.holder} ended while it moved the alias {alias} of {'/'.join(model)} to version "
                    f"{each.version}; the next promotion finds out whether it is there"
                )
    return found


def _read(store: Store, key: str) -> Promotion:
    try:
        found = json.loads(store.get(key))
        return Promotion(**{**found, "holder": Holder(**found["holder"])})
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{store.uri}/{key} is not what a promotion writes ({error}): it was edited or damaged; restore it, or "
            "delete it if the alias in MLflow is right"
        ) from None


def _is_at(now: Version | None, promotion: Promotion) -> bool:
    return now is not None and now.number == promotion.version
