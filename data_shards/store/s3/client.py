"""S3 clients, and retries of operations.

botocore signs, sends and parses; retries are done here, with botocore's disabled, because those give up early and stay
slow. Measured with botocore 1.44.5 in adaptive mode: with 40 % of answers being 500, its retry quota ran out and 36 of
300 requests failed, although six attempts each would have failed only 1; after a single SlowDown and 30 s of quiet, 32
requests took 0.92 s instead of 0.12 s, and after 30 s more 0.62 s. Here none of the 300 failed, and the 32 took 0.10
and 0.12 s.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.config import Config

from data_shards.store.outage import Outage, outage_of
from data_shards.store.s3.errors import DamagedError, Trouble, trouble_of

SILENCE_S = 20.0  # an attempt ends after so long without data from the server
LONGEST_PAUSE_S = 5.0  # between attempts, unless the server asks to slow down
# Wrong keys stay wrong, but a worker may read a credentials file while it is being rewritten.
PATIENCE_OF = {Trouble.EXPIRED: 20.0, Trouble.REFUSED: 0.5}


@dataclass(frozen=True)
class Connection:
    """A client of this process, and the keys from the AWS variables and files at its creation."""

    client: Any
    keys: Any


class Pace:
    """The gap between this process's requests to one bucket: none until the store asks to slow down.

    SlowDown doubles it, from 20 ms to at most 0.5 s; every 2 s without one halve it, so that a throttled reader is back
    to full speed after some seconds.
    """

    FIRST_S, MOST_S, HALF_LIFE_S = 0.02, 0.5, 2.0

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep):
        self._clock, self._sleep, self._lock = clock, sleep, threading.Lock()
        self._gap_s, self._since, self._next = 0.0, 0.0, 0.0

    def wait(self) -> None:
        """Waits until the next request may be sent."""
        while True:
            with self._lock:
                now = self._clock()
                if self._next <= now or not self._gap(now):
                    self._next = now + self._gap(now)
                    return
                wait_s = min(self._next - now, self._gap(now))
            self._sleep(wait_s)

    def slower(self) -> None:
        """Records a SlowDown; several in one burst of requests count once."""
        with self._lock:
            now = self._clock()
            gap = self._gap(now)
            if not gap or now - self._since > max(gap, 0.1):
                self._gap_s, self._since = min(self.MOST_S, max(self.FIRST_S, 2 * gap)), now

    def _gap(self, now: float) -> float:
        gap = self._gap_s * 0.5 ** ((now - self._since) / self.HALF_LIFE_S)
        return gap if gap > 1e-3 else 0.0


class Tries:
    """The attempts of one operation: their client, their timing and when to stop.

    No attempt begins after `until`, nor once the server has been unreachable for `patience_s`, no matter which
    operation noticed it: so a permanent outage is waited for once, not by each operation in turn.
    """

    def __init__(self, bucket: str, *, until: float, patience_s: float, silence_s: float):
        self.count = 0  # failed attempts
        self.unsure = False  # whether a failed attempt may have been carried out
        self._until, self._patience_s, self._silence_s = until, patience_s, silence_s
        self._outage = store_outage(bucket)
        self._began: dict[Trouble, float] = {}
        self._pace = _pace(os.getpid(), bucket)
        self._connection = connect(silence_s)

    def client(self) -> Any:
        """The client for the next attempt, once it may be sent."""
        self._pace.wait()
        return self._connection.client

    def answered(self) -> None:
        """Records an answer, even a refusal: the server is reachable."""
        self._outage.answered()

    def failed(self, error: Exception) -> None:
        """Waits until the next attempt; raises the error if none would help or time is up."""
        trouble = trouble_of(error)
        if trouble is Trouble.FINAL:
            self.answered()
            raise error
        now, wait_s = time.monotonic(), random.random() * min(LONGEST_PAUSE_S, 0.05 * 2**self.count)
        self.count += 1
        away_s = 0.0
        if trouble is Trouble.BROKEN and not isinstance(error, DamagedError):
            away_s = self._outage.failed(self._patience_s)
        self.unsure |= trouble is Trouble.BROKEN
        if trouble is Trouble.SLOW_DOWN:
            self._pace.slower()
            wait_s = random.random() * min(8.0, 0.1 * 2**self.count)
        elif trouble in PATIENCE_OF:
            began = self._began.setdefault(trouble, now)
            renewed = renew(self._connection, self._silence_s)
            if renewed is not self._connection:
                self._connection, wait_s = renewed, 0.0
                del self._began[trouble]
            elif now + wait_s > began + PATIENCE_OF[trouble]:
                raise error
        if now + wait_s > self._until or away_s > self._patience_s:
            raise error
        time.sleep(wait_s)


def store_outage(bucket: str) -> Outage:
    """The outage state of a bucket's server in this process."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return outage_of(f"the store s3://{bucket}" + (f" at {endpoint}" if endpoint else ""))


_Key = tuple[int, float, tuple[tuple[str, str], ...]]
"""Process (a forked one must not share sockets), silence_s and AWS variables (tests change keys)."""
_connections: dict[_Key, Connection] = {}
_paces: dict[tuple[int, str | None, str], Pace] = {}
_lock = threading.Lock()


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def connect(silence_s: float) -> Connection:
    """This process's connection for the current AWS variables, created on first use."""
    key = (os.getpid(), silence_s, _aws_variables())
    return _connections.get(key) or _connected(key, None)


def renew(failed: Connection, silence_s: float) -> Connection:
    """A connection with the current keys; the failed one if they have not changed."""
    if _keys(_session()) == failed.keys:
        return failed
    return _connected((os.getpid(), silence_s, _aws_variables()), failed)


def _connected(key: _Key, failed: Connection | None) -> Connection:
    config = Config(
        connect_timeout=key[1] / 2,  # also limits the sending of each block of a body
        read_timeout=key[1],
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=32,
        # We send Content-MD5, which every S3 server supports. radosgw 16 refuses some of the newer checksums, and a
        # multipart upload created with one needs it again for each part.
        request_checksum_calculation="when_required",
    )
    with _lock:
        found = _connections.get(key)
        if found is None or found is failed:
            session = _session()
            found = Connection(session.client("s3", config=config), _keys(session))
            for old in list(_connections)[:-3]:
                del _connections[old]
            _connections[key] = found
        return found


def _session() -> Any:
    return boto3.session.Session()


def _keys(session: Any) -> Any:
    keys = session.get_credentials()
    return keys and keys.get_frozen_credentials()


def _pace(pid: int, bucket: str) -> Pace:
    return _paces.setdefault((pid, os.environ.get("AWS_ENDPOINT_URL_S3"), bucket), Pace())


def _aws_variables() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
