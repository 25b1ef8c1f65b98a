"""The interface of stores, their keys and errors: objects by key, read completely or by range, written atomically.

Keys are '/'-separated and relative to the store's uri. Stores are picklable; credentials and endpoint come from the
standard AWS variables and files of the process that uses them.
"""

from __future__ import annotations

import contextlib
import io
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Self

from data_shards.store.disk import DiskFullError
from data_shards.store.outage import PATIENCE_S

UNFINISHED = ".tmp-"  # prefix of files of an unfinished write; not allowed in keys
_PIECE_BYTES = 16 << 20
_PROBE_S = 4.0  # for all operations of a probe


class StoreError(ValueError):
    """An operation of a store failed; the message has the store, the problem and a remedy."""


class StoreFullError(StoreError, DiskFullError):
    """The disk of a local store is full."""


class StoreAwayError(StoreError):
    """The store's server was unreachable for longer than `patience_s`."""


class StorePathError(StoreError):
    """A local store has a file instead of a folder or vice versa: waiting does not help."""


class StoreKeyError(StoreError, KeyError):
    """The store has no object with this key."""

    __str__ = ValueError.__str__  # KeyError would print the repr


class Store(ABC):
    """Objects by key. `uri` is an absolute folder or `s3://bucket/prefix`.

    `patience_s` is how long operations wait for an unreachable server; stores derived from this one (`at`, pickled
    copies) inherit it.
    """

    uri: str
    is_local: bool
    patience_s: float = PATIENCE_S

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether exactly one of several writers with `if_absent` wins. If not, the user is warned once."""

    @abstractmethod
    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """Writes an object atomically; with `if_absent`, returns False if one already exists.

        A write whose answer was lost is retried, and counts as ours if the object then has these bytes. If the store is
        not `conditional`, `if_absent` may overwrite.
        """

    def ensure(self, key: str, data: bytes | Path) -> bool:
        """Ensures that an object has these bytes; returns True if this call wrote them.

        Other bytes (from earlier settings, or damaged) are replaced. Two writers of the same bytes both succeed.
        """
        if self.put(key, data, if_absent=True):
            return True
        return False if self.holds(key, data) else self.put(key, data)

    @abstractmethod
    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """The bytes [start, start + length) of an object, fewer at its end; StoreKeyError if it is missing."""

    @abstractmethod
    def fetch(self, key: str, path: Path) -> None:
        """Copies an object to a local file, which may be incomplete after an error; StoreKeyError if missing."""

    def holds(self, key: str, data: bytes | Path) -> bool:
        """Whether the object has exactly these bytes."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if self.head(key) != size:
            return False
        # Reading a complete object verifies its checksum, reading a range does not.
        length = _PIECE_BYTES if size > _PIECE_BYTES else None
        try:
            with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
                return all(
                    self.get(key, start=start, length=length) == file.read(_PIECE_BYTES)
                    for start in range(0, size, _PIECE_BYTES)
                )
        except StoreKeyError:  # just deleted
            return False

    @abstractmethod
    def head(self, key: str) -> int | None:
        """The object's size in bytes; None if it is missing."""

    @abstractmethod
    def tag(self, key: str) -> str:
        """A short text that changes when the object is replaced; StoreKeyError if it is missing."""

    @abstractmethod
    def age_s(self, key: str) -> float:
        """Seconds since an object was written, by the store's clock; StoreKeyError if it is missing."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[str]:
        """All keys that begin with `prefix`, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object, if it exists."""

    @abstractmethod
    def clean(self, *, older_than_s: float) -> tuple[str, ...]:
        """Removes unfinished writes of killed processes older than this; returns their keys."""

    @abstractmethod
    def path(self, key: str) -> Path | None:
        """The local file of an object; None if objects are not files."""

    @abstractmethod
    def at(self, *parts: str) -> Self:
        """The part of this store below `parts`."""

    @abstractmethod
    def with_patience(self, total_s: float) -> Self:
        """This store, with all attempts of all operations limited to the next `total_s`.

        Outages are still reported with the user's `patience_s`.
        """

    def check(self) -> None:
        """Writes, reads and deletes a probe object; StoreError with the problem within 15 s."""
        key, data = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        probe = self.with_patience(_PROBE_S)
        probe.put(key, data, if_absent=True)
        try:
            if probe.get(key) != data:
                raise StoreError(f"{self.uri} returned other bytes than were written; use another store")
        finally:
            with contextlib.suppress(StoreError):
                probe.delete(key)
        _ = probe.conditional  # warns if it is not

    def reach(self) -> None:
        """Looks for an object without writing; StoreError within 15 s if the store is unreachable."""
        self.with_patience(_PROBE_S).head(".probe")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)


def checked_key(key: str) -> str:
    """The key itself; StoreError if it is invalid."""
    if not isinstance(key, str) or "\0" in key:  # keys may come from untrusted files
        raise StoreError(f"{key!r} is not a key: a key is text without zero bytes")
    parts = PurePosixPath(key).parts
    plain = bool(key) and not key.startswith("/") and ".." not in parts and "/".join(parts) == key
    if not plain or any(part.startswith(UNFINISHED) for part in parts):
        raise StoreError(f"{key!r} is not a key: a key has parts joined by single '/', without '..' or a leading '/'")
    return key
