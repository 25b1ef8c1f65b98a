"""One driver at a time, for stores without conditional writes: a lease object that is renewed regularly."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from data_shards.store.store import Store, StoreError, StoreKeyError

RENEW_S = 4.0  # for all requests of one renewal
_log = logging.getLogger(__name__)


class LeaseError(StoreError):
    """Another process holds the lease, or it was lost; the message has the holder and a remedy."""


class Lease:
    """A held lease; call `check` before a write that must not happen twice."""

    def __init__(self, store: Store, key: str, owner: str, *, ttl_s: float, settle_s: float):
        self._store, self._key, self._owner, self._ttl_s, self._settle_s = store, key, owner, ttl_s, settle_s
        self._token = secrets.token_hex(16)
        self._renewed = time.monotonic()
        self._lost = ""
        self._ended = threading.Event()

    def check(self) -> None:
        """Raises LeaseError if another process may be working here.

        A lease that could not be renewed in time, because the store was unreachable or this process was paused, is
        still ours if no other process has written it since; this waits for the store.
        """
        if not self._lost and time.monotonic() - self._renewed > self._ttl_s and not self._is_taken_back():
            self._lost = f"it could not be renewed for {self._ttl_s:g} s, and another driver has taken it"
        if self._lost:
            raise LeaseError(
                f"the lease {self._key} of {self._store.uri} was lost ({self._lost}), so another driver may be "
                "running; rerun when no other conversion of this dataset is running; finished work is kept"
            )

    def take(self, *, until: float) -> None:
        """Waits until this process holds the lease; LeaseError if another's is valid at `until` (monotonic)."""
        store, key = self._store, self._key
        while True:
            found = _read(store, key)
            if found is None or _is_over(store, key, found):
                self._write(store)
                time.sleep(self._settle_s)
                if self._is_ours(store):
                    return
                found = _read(store, key) or {"owner": "another driver"}
            if time.monotonic() > until:
                raise LeaseError(
                    f"{found['owner']} is working in {store.uri} (its lease {key} is valid); wait until it has "
                    f"finished; if it was killed, its lease ends {found.get('ttl_s', self._ttl_s):g} s after the last "
                    "renewal"
                )
            time.sleep(min(1.0, self._ttl_s / 10))

    def renewed(self) -> contextlib.AbstractContextManager[None]:
        """Context that renews the lease from another thread."""
        return renewed_by_thread(self._keep, self._ended, f"lease {self._key}")

    def give_back(self) -> None:
        """Ends the lease; if the store cannot be reached, the lease expires."""
        store = self._store.with_patience(RENEW_S)
        with contextlib.suppress(StoreError):
            if not self._lost and self._is_ours(store):
                store.delete(self._key)

    def _write(self, store: Store) -> None:
        began = time.monotonic()  # before the write, so the age is never underestimated
        content = {"owner": self._owner, "ttl_s": self._ttl_s, "token": self._token}
        store.put(self._key, json.dumps(content, indent=1).encode())
        self._renewed = began

    def _is_taken_back(self) -> bool:
        if not self._is_ours(self._store):
            return False
        self._write(self._store)
        time.sleep(self._settle_s)  # another driver may have found it expired at the same moment
        return self._is_ours(self._store)

    def _is_ours(self, store: Store) -> bool:
        found = _read(store, self._key)
        return found is not None and bool(found["token"] == self._token)

    def _keep(self) -> None:
        """Renews until the lease has ended or another process has taken it."""
        while not self._ended.wait(self._ttl_s / 3):
            try:
                store = self._store.with_patience(RENEW_S)
                if not self._is_ours(store):
                    self._lost = "another driver has taken it"
                    return
                self._write(store)
            except StoreError as error:  # `check` sees how long it has not been renewed
                _log.info("the lease %s could not be renewed: %s", self._key, error)


@contextlib.contextmanager
def renewed_by_thread(keep: Callable[[], None], ended: threading.Event, name: str) -> Iterator[None]:
    """Runs `keep` in a thread called `name` during the block, then sets `ended` and waits for `keep` to return."""
    keeper = threading.Thread(target=keep, name=name, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


@contextlib.contextmanager
def lease(
    store: Store, key: str, owner: str, *, ttl_s: float = 60.0, settle_s: float = 2.0, wait_s: float = 0.0
) -> Iterator[Lease]:
    """Holds the lease object `key` while the block lasts; it is renewed every `ttl_s` / 3 and deleted at the end.

    Guaranteed: a second driver is kept out while the first one works; the lease of a killed driver ends `ttl_s` after
    its last renewal, by the store's clock, so the machines' clocks need not agree.

    Not guaranteed, because such a store has no atomic operation: two drivers that start at almost the same time both
    write the object, wait `settle_s` and check whose write remained. If a write takes longer than that, both continue
    until one of them finds the other's at its next renewal (`ttl_s` / 3). A driver that was stopped or cut off from the
    store for longer than `ttl_s` notices at its next `check`. So call `check` before each write that must not happen
    twice, and write only what two drivers would write identically.

    Args:
        store: Store of the dataset.
        key: Key of the lease object in that store.
        owner: Name of this driver, for messages to other drivers.
        ttl_s: Validity after the last renewal; clocks of stores tick in seconds.
        settle_s: Time until a write is visible to others.
        wait_s: How long to wait for another's lease to end.

    Raises:
        LeaseError: another driver holds it.
    """
    held = Lease(store, key, owner, ttl_s=ttl_s, settle_s=settle_s)
    held.take(until=time.monotonic() + wait_s)
    try:
        with held.renewed():
            yield held
    finally:
        held.give_back()


@contextlib.contextmanager
def one_driver(store: Store, key: str, owner: str, *, wait_s: float = 0.0) -> Iterator[Lease | None]:
    """A lease if the store needs one, else None: with conditional writes any number of drivers may work."""
    if store.conditional:
        yield None
        return
    with lease(store, key, owner, wait_s=wait_s) as held:
        yield held


def _is_over(store: Store, key: str, found: dict[str, Any]) -> bool:
    try:
        return store.age_s(key) > float(found["ttl_s"])
    except StoreKeyError:
        return True


def _read(store: Store, key: str) -> dict[str, Any] | None:
    """The content of the lease object; None if it is missing or invalid."""
    try:
        data = store.get(key)
    except StoreKeyError:
        return None
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"owner", "ttl_s", "token"} <= found.keys() else None
