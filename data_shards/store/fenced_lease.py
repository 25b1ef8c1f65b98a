"""One process at a time, by conditional writes: a lease whose takeovers are numbered, so that each has one winner."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from data_shards.store.claims import Claim, Claims
from data_shards.store.holder import Holder, this_process
from data_shards.store.lease import RENEW_S, LeaseError, renewed_by_thread
from data_shards.store.store import Store, StoreError, StoreKeyError

TTL_S = 45.0  # with WATCH_S and the second in which stores count, a dead holder is replaced within a minute
WATCH_S = 5.0  # a lease that looks old is watched for so long: after an outage its holder renews it first
SETTLE_S = 2.0  # how long a write may take to be seen, where a store cannot say who was first
GRAIN_S = 2.0  # stores count in whole seconds, once for the object and once for the present
_log = logging.getLogger(__name__)


class LostLeaseError(LeaseError):
    """The lease was held and another process has taken it: says which, and what to do."""


def is_lost(check: Callable[[], None]) -> bool:
    """Whether `check` of a lease finds that another process has taken it; not where the store cannot be asked."""
    try:
        check()
    except LostLeaseError:
        return True
    except StoreError:
        return False
    return False


@dataclass(frozen=True)
class Fence:
    """A lease as the workers of its holder know it: they see that another process has taken it, and renew nothing."""

    claims: Claims
    number: int
    what: str

    def check(self) -> None:
        """Raises LostLeaseError once another process has taken the lease; asks the store."""
        number = self.claims.last()
        if number != self.number:
            found = self.claims.read(number)
            raise LostLeaseError(_taken_over(self.what, str(found.holder) if found else "another process"))


class FencedLease:
    """A held lease. `number` grows with each takeover; `before` is the claim of a holder that died, else None."""

    def __init__(self, store: Store, prefix: str, *, what: str, ttl_s: float, on_lost: Callable[[], None] | None):
        self._claims, self._what, self._on_lost = Claims(store, prefix), what, on_lost
        self._claim = Claim(
            secrets.token_hex(16), this_process(), datetime.now(UTC).isoformat(timespec="seconds"), ttl_s
        )
        self._good_until = 0.0
        self._lost = ""
        self._lock = threading.RLock()  # the keeper renews while `check` and `note` do
        self._ended = threading.Event()
        self.number = 0
        self.before: Claim | None = None

    @property
    def fence(self) -> Fence:
        """What the workers of this process ask."""
        return Fence(self._claims, self.number, self._what)

    @property
    def is_lost(self) -> bool:
        """Whether it is known already that another process has taken the lease; asks nobody."""
        return bool(self._lost)

    def check(self, *, for_s: float = 0.0) -> None:
        """Raises LostLeaseError unless this process holds the lease, for another `for_s` seconds if it is not paused.

        Asks the store. A process that is paused between this call and what it does next cannot be held back by any
        lease: whatever must not be overwritten late has to be looked at again afterwards.
        """
        with self._lock:
            self._look()
            if self._good_until - _now() < for_s:
                self._write(self._claims)
                self._look()

    def note(self, **about: Any) -> None:
        """Keeps `about` in the lease: what a successor has to know if this process dies."""
        with self._lock:
            self._look()
            self._claim = replace(self._claim, about={**self._claim.about, **about})
            self._write(self._claims)

    def take(self, *, remedy: str, wait_s: float, say: Callable[[str], None]) -> None:
        """Waits until this process holds the lease; LeaseError where a holder is alive after `wait_s`."""
        claims, watch = self._claims, _Watch(self._claims)
        began, pause_s, is_told = time.monotonic(), 0.05, False
        while True:
            number = claims.last()
            found = claims.read(number) if number else None
            if found is None or found.is_over or found.holder.is_dead or watch.is_abandoned(number, found):
                if self.claim(number + 1, found):
                    self.before = None if found is None or found.is_over else found
                    return
            elif time.monotonic() - began > wait_s and watch.is_alive(found):
                raise LeaseError(f"{self._held_by(found)}: {remedy}")
            elif not is_told:
                say(f"{self._held_by(found)}; waiting for it")
                is_told = True
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(1.0, 1.5 * pause_s)

    def claim(self, number: int, found: Claim | None) -> bool:
        """Whether this process has won this number, nobody has a higher one, and the claim before is as `found`."""
        claims, began = self._claims, _now()
        self.number = number  # from here on it is given back, whatever happens
        if claims.write(number, self._claim, if_absent=True):
            self._good_until = began + self._claim.ttl_s - GRAIN_S
            if not claims.store.conditional:
                time.sleep(SETTLE_S)
            numbers, ours = claims.numbers(), claims.read(number)
            if ours is not None and ours.token == self._claim.token:
                # A number below the highest may have been free because its object was removed: then it holds nothing.
                # A holder renews and then looks; we write and then look. So one of the two always sees the other.
                if max(numbers, default=0) == number and _is_unchanged(claims, number - 1, found):
                    for lower in numbers:
                        if lower < number:
                            claims.remove(lower)
                    return True
                claims.remove(number)
        self.number = 0
        return False

    def renewed(self) -> contextlib.AbstractContextManager[None]:
        """Context that renews the lease from another thread."""
        return renewed_by_thread(self._keep, self._ended, f"lease {self._claims.prefix}")

    def give_back(self) -> None:
        """Ends the lease, if this process has claimed it; where the store cannot be reached it ends by itself."""
        if not self.number:
            return
        with contextlib.suppress(StoreError), self._lock:
            claims = self._claims.within(RENEW_S)
            found = claims.read(self.number)
            if not self._lost and found is not None and found.token == self._claim.token:
                # The object stays: a number that came back could be mistaken for an older holder's.
                claims.write(self.number, replace(self._claim, is_over=True))

    def _held_by(self, found: Claim) -> str:
        return f"{self._what} is held by {found.holder} since {found.since}"

    def _look(self) -> None:
        if not self._lost and self._claims.last() != self.number:
            self._lose()
        if self._lost:
            raise LostLeaseError(_taken_over(self._what, self._lost))

    def _lose(self) -> None:
        found = self._claims.read(self._claims.last())
        self._lost = str(found.holder) if found else "another process"

    def _write(self, claims: Claims) -> None:
        began = _now()  # its age counts from before it was written
        self._claim = replace(self._claim, renewals=self._claim.renewals + 1)
        claims.write(self.number, self._claim)
        self._good_until = began + self._claim.ttl_s - GRAIN_S

    def _keep(self) -> None:
        """Renews until the lease is given back, or another process has taken it."""
        wait_s, is_told = self._claim.ttl_s / 5, False
        while not self._ended.wait(wait_s):
            wait_s = self._claim.ttl_s / 5
            try:
                with self._lock:
                    claims = self._claims.within(RENEW_S)
                    if claims.last() == self.number:
                        self._write(claims)
                        is_told = False
                        continue
                    self._lose()
            except StoreError as error:
                if not is_told and _now() > self._good_until:  # once for each time that it runs out
                    is_told = True
                    _log.warning(
                        "the lease of %s could not be renewed, and another process may take it: %s", self._what, error
                    )
                wait_s = self._claim.ttl_s / 45  # before anybody who waits has watched it for WATCH_S
                continue
            if self._on_lost is not None and not self._ended.is_set():
                self._on_lost()
            return


def is_held(store: Store, prefix: str, number: int) -> bool:
    """Whether the claim `number` of the lease `prefix` still holds, as far as one look can tell.

    It is the last one, was not given back, and was renewed within its time by a process that is not known to be dead.
    """
    claims = Claims(store, prefix)
    last = claims.last()
    return last == number and _holder(claims, last) is not None


def current_holder(store: Store, prefix: str) -> Holder | None:
    """The process that holds the lease `prefix`, as far as one look can tell; None where nobody does."""
    claims = Claims(store, prefix)
    return _holder(claims, claims.last())


def _holder(claims: Claims, number: int) -> Holder | None:
    found = claims.read(number)
    if found is None or found.is_over or found.holder.is_dead:
        return None
    try:
        return found.holder if claims.age_s(number) <= found.ttl_s + WATCH_S else None
    except StoreKeyError:  # somebody has taken over meanwhile
        return None


@contextlib.contextmanager
def fenced_lease(
    store: Store,
    prefix: str,
    *,
    what: str,
    remedy: str,
    wait_s: float,
    ttl_s: float = TTL_S,
    say: Callable[[str], None] = lambda text: None,
    on_lost: Callable[[], None] | None = None,
) -> Iterator[FencedLease]:
    """Holds the lease `prefix` while the block lasts.

    How: the claim with the highest number holds. A claim is taken by writing the next number with `if_absent`, of
    which a store lets one writer win, and only where the highest one was given back, belongs to a process that has
    died on this machine, or was not renewed for `ttl_s` by the store's own clock and is not renewed while it is
    watched for `WATCH_S` either. A holder renews only its own object, and asks whether a higher one exists
    (`check`): so one that was paused for long finds out, and never overwrites its successor's claim.

    Where the store ignores conditional writes, a claim counts `SETTLE_S` after it was written if it is still there:
    better than nothing, but two that write later than that after each other both go on.

    Args:
        store: Where the lease objects are.
        prefix: Key in `store` below which they are.
        what: What is held, as the beginning of a sentence: "run 'a'".
        remedy: What to do about a holder that is alive.
        wait_s: How long to wait for a holder that is alive. One that is not is waited for in any case.
        ttl_s: How long a claim outlives its last renewal.
        say: Hears once who is waited for.
        on_lost: Called from another thread when somebody else has taken the lease.

    Raises:
        LeaseError: another process holds it: says which, since when, and `remedy`.
    """
    held = FencedLease(store, prefix, what=what, ttl_s=ttl_s, on_lost=on_lost)
    try:
        held.take(remedy=remedy, wait_s=wait_s, say=say)
        with held.renewed():
            yield held
    finally:
        held.give_back()


def _is_unchanged(claims: Claims, number: int, found: Claim | None) -> bool:
    if found is None or found.is_over:
        return True
    now = claims.read(number)
    return now is None or now.renewals == found.renewals or now.is_over


class _Watch:
    """What a process that waits has seen of the claim it waits for."""

    def __init__(self, claims: Claims):
        self._claims, self._place = claims, this_process().place
        self._tag, self._since, self._last, self._renewals = "", 0.0, 0.0, 0

    def is_abandoned(self, number: int, found: Claim) -> bool:
        """Whether the claim was not renewed for its time, nor for WATCH_S before our eyes."""
        try:
            age_s, tag = self._claims.age_s(number), self._claims.tag(number)
        except StoreKeyError:
            return False  # somebody has taken over meanwhile
        now = time.monotonic()
        self._renewals += tag != self._tag != ""
        if tag != self._tag or now - self._last > WATCH_S:  # the store may have been out of reach for its holder too
            self._tag, self._since = tag, now
        self._last = now
        return age_s > found.ttl_s and now - self._since >= min(WATCH_S, found.ttl_s / 3)

    def is_alive(self, found: Claim) -> bool:
        """Whether the holder certainly is, so that waiting longer may not help."""
        return self._renewals > 0 or found.holder.place == self._place != ""


def _taken_over(what: str, by: str) -> str:
    return (
        f"{what} was taken over by {by} while this process was paused or the store out of reach: what is finished is "
        "kept; run the same command again once the other has ended"
    )


def fenced_check(check: Callable[[], None]) -> Callable[[], None]:
    """The `check` of a lease as workers ask it, in other processes; any other function as it is."""
    held = getattr(check, "__self__", None)
    return held.fence.check if isinstance(held, FencedLease) else check


def _now() -> float:
    """A clock that also counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
