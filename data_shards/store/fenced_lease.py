"""One process at a time, by conditional writes: takeovers of the lease are numbered, so that each has one winner."""

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

TTL_S = 45.0  # with WATCH_S and clocks that tick in seconds, a dead holder is replaced within a minute
WATCH_S = 5.0  # an expired lease is watched for so long, because its holder may renew it after an outage
SETTLE_S = 2.0  # time until a write is visible, for stores without conditional writes
GRAIN_S = 2.0  # stores count in whole seconds, for the object's time and for the current time
_log = logging.getLogger(__name__)


class LostLeaseError(LeaseError):
    """Another process has taken the lease from this one; the message has the process and a remedy."""


def is_lost(check: Callable[[], None]) -> bool:
    """Whether `check` of a lease finds that another process has taken it; False if the store is unreachable."""
    try:
        check()
    except LostLeaseError:
        return True
    except StoreError:
        return False
    return False


@dataclass(frozen=True)
class Fence:
    """A lease as seen by the holder's workers: they can check it, but do not renew it."""

    claims: Claims
    number: int
    what: str

    def check(self) -> None:
        """Raises LostLeaseError if another process has taken the lease; asks the store."""
        number = self.claims.last()
        if number != self.number:
            found = self.claims.read(number)
            raise LostLeaseError(_taken_over(self.what, str(found.holder) if found else "another process"))


class FencedLease:
    """A held lease. `number` grows with each takeover; `before` is the claim of a dead previous holder, else None."""

    def __init__(self, store: Store, prefix: str, *, what: str, ttl_s: float, on_lost: Callable[[], None] | None):
        self._claims, self._what, self._on_lost = Claims(store, prefix), what, on_lost
        self._claim = Claim(
            secrets.token_hex(16), this_process(), datetime.now(UTC).isoformat(timespec="seconds"), ttl_s
        )
        self._good_until = 0.0
        self._lost = ""
        self._lock = threading.RLock()  # the keeper thread renews concurrently with `check` and `note`
        self._ended = threading.Event()
        self.number = 0
        self.before: Claim | None = None

    @property
    def fence(self) -> Fence:
        """A view of this lease for the workers."""
        return Fence(self._claims, self.number, self._what)

    @property
    def is_lost(self) -> bool:
        """Whether a takeover by another process is already known; does not ask the store."""
        return bool(self._lost)

    def check(self, *, for_s: float = 0.0) -> None:
        """Raises LostLeaseError unless this process holds the lease for at least `for_s` more seconds. Asks the store.

        No lease can stop a process that is paused right after this call: verify afterwards whatever must not be
        overwritten late.
        """
        with self._lock:
            self._look()
            if self._good_until - _now() < for_s:
                self._write(self._claims)
                self._look()

    def note(self, **about: Any) -> None:
        """Stores `about` in the lease, for the successor if this process dies."""
        with self._lock:
            self._look()
            self._claim = replace(self._claim, about={**self._claim.about, **about})
            self._write(self._claims)

    def take(self, *, remedy: str, wait_s: float, say: Callable[[str], None]) -> None:
        """Waits until this process holds the lease; LeaseError if another holder is alive after `wait_s`."""
        claims, watch = self._claims, _Watch(self._claims)
        began, pause_s, is_reported = time.monotonic(), 0.05, False
        while True:
            number = claims.last()
            found = claims.read(number) if number else None
            if found is None or found.is_over or found.holder.is_dead or watch.is_abandoned(number, found):
                if self.claim(number + 1, found):
                    self.before = None if found is None or found.is_over else found
                    return
            elif time.monotonic() - began > wait_s and watch.is_alive(found):
                raise LeaseError(f"{self._held_by(found)}: {remedy}")
            elif not is_reported:
                say(f"{self._held_by(found)}; waiting for it")
                is_reported = True
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(1.0, 1.5 * pause_s)

    def claim(self, number: int, found: Claim | None) -> bool:
        """Whether this process gets this number, no higher one exists, and the previous claim still equals `found`."""
        claims, began = self._claims, _now()
        self.number = number  # set before the write, so that `give_back` ends it in any case
        if claims.write(number, self._claim, if_absent=True):
            self._good_until = began + self._claim.ttl_s - GRAIN_S
            if not claims.store.conditional:
                time.sleep(SETTLE_S)
            numbers, ours = claims.numbers(), claims.read(number)
            if ours is not None and ours.token == self._claim.token:
                # A number below the highest may have been free because its object was removed: it does not count.
                # A holder renews and then checks; we write and then check. So one of the two always sees the other.
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
        """Ends the lease if this process has claimed it; if the store cannot be reached, the lease expires."""
        if not self.number:
            return
        with contextlib.suppress(StoreError), self._lock:
            claims = self._claims.within(RENEW_S)
            found = claims.read(self.number)
            if not self._lost and found is not None and found.token == self._claim.token:
                # The object remains, because a reused number could be mistaken for an older holder's.
                claims.write(self.number, replace(self._claim, is_over=True))

    def _held_by(self, found: Claim) -> str:
        return f"{self._what} has been held by {found.holder} since {found.since}"

    def _look(self) -> None:
        if not self._lost and self._claims.last() != self.number:
            self._lose()
        if self._lost:
            raise LostLeaseError(_taken_over(self._what, self._lost))

    def _lose(self) -> None:
        found = self._claims.read(self._claims.last())
        self._lost = str(found.holder) if found else "another process"

    def _write(self, claims: Claims) -> None:
        began = _now()  # before the write, so the age is never underestimated
        self._claim = replace(self._claim, renewals=self._claim.renewals + 1)
        claims.write(self.number, self._claim)
        self._good_until = began + self._claim.ttl_s - GRAIN_S

    def _keep(self) -> None:
        """Renews until the lease is given back, or another process has taken it."""
        wait_s, is_reported = self._claim.ttl_s / 5, False
        while not self._ended.wait(wait_s):
            wait_s = self._claim.ttl_s / 5
            try:
                with self._lock:
                    claims = self._claims.within(RENEW_S)
                    if claims.last() == self.number:
                        self._write(claims)
                        is_reported = False
                        continue
                    self._lose()
            except StoreError as error:
                if not is_reported and _now() > self._good_until:  # once per expiry
                    is_reported = True
                    _log.warning(
                        "the lease of %s could not be renewed, and another process may take it: %s", self._what, error
                    )
                wait_s = self._claim.ttl_s / 45  # shorter than WATCH_S, so that a waiting process sees the renewal
                continue
            if self._on_lost is not None and not self._ended.is_set():
                self._on_lost()
            return


def is_held(store: Store, prefix: str, number: int) -> bool:
    """Whether the claim `number` of the lease `prefix` seems to be valid; one check, without waiting.

    It must be the last one, not given back, and renewed in time by a process that is not known to be dead.
    """
    claims = Claims(store, prefix)
    last = claims.last()
    return last == number and _holder(claims, last) is not None


def current_holder(store: Store, prefix: str) -> Holder | None:
    """The process that seems to hold the lease `prefix`, or None; one check, without waiting."""
    claims = Claims(store, prefix)
    return _holder(claims, claims.last())


def _holder(claims: Claims, number: int) -> Holder | None:
    found = claims.read(number)
    if found is None or found.is_over or found.holder.is_dead:
        return None
    try:
        return found.holder if claims.age_s(number) <= found.ttl_s + WATCH_S else None
    except StoreKeyError:  # another process has just taken over
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

    The claim with the highest number holds. A process takes the lease by writing the next number with `if_absent`,
    which only one writer can win, and only if the highest claim was given back, belongs to a process that has died on
    this machine, or has not been renewed for `ttl_s` by the store's clock, nor while it was watched for `WATCH_S`. A
    holder renews only its own object and checks whether a higher one exists (`check`): after a long pause it notices
    the takeover, and never overwrites its successor's claim.

    Without conditional writes, a claim counts if it is still there `SETTLE_S` after it was written. This is weaker: if
    a write takes longer than that, two processes both continue.

    Args:
        store: Store of the lease objects.
        prefix: Their key prefix in `store`.
        what: The leased thing, as the beginning of a sentence: "run 'a'".
        remedy: What the user can do about a live holder.
        wait_s: How long to wait for a live holder. A dead one is always waited for.
        ttl_s: Validity of a claim after its last renewal.
        say: Called once with a message about the holder that is waited for.
        on_lost: Called from another thread when another process has taken the lease.

    Raises:
        LeaseError: another process holds the lease; the message has the process, since when, and `remedy`.
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
    """Observations of a waiting process about the claim it waits for."""

    def __init__(self, claims: Claims):
        self._claims, self._place = claims, this_process().place
        self._tag, self._since, self._last, self._renewals = "", 0.0, 0.0, 0

    def is_abandoned(self, number: int, found: Claim) -> bool:
        """Whether the claim has expired and has not been renewed while watched for WATCH_S."""
        try:
            age_s, tag = self._claims.age_s(number), self._claims.tag(number)
        except StoreKeyError:
            return False  # another process has just taken over
        now = time.monotonic()
        self._renewals += tag != self._tag != ""
        if tag != self._tag or now - self._last > WATCH_S:  # the holder may have been cut off from the store too
            self._tag, self._since = tag, now
        self._last = now
        return age_s > found.ttl_s and now - self._since >= min(WATCH_S, found.ttl_s / 3)

    def is_alive(self, found: Claim) -> bool:
        """Whether the holder is certainly alive, so that waiting longer may not help."""
        return self._renewals > 0 or found.holder.place == self._place != ""


def _taken_over(what: str, by: str) -> str:
    return (
        f"{what} was taken over by {by} while this process was paused or the store was unreachable; finished work is "
        "kept; rerun the command when the other process has ended"
    )


def fenced_check(check: Callable[[], None]) -> Callable[[], None]:
    """The `check` of a lease for workers in other processes; any other function unchanged."""
    held = getattr(check, "__self__", None)
    return held.fence.check if isinstance(held, FencedLease) else check


def _now() -> float:
    """A monotonic clock that also advances while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
