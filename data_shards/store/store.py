"""What every store does, its keys and its errors: objects by key, whole or by range, never half-written.

Keys are '/'-separated and relative to the store's uri. A store can be pickled; credentials and endpoint come from the
standard AWS variables and files of the process that uses it.
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

UNFINISHED = ".tmp-"  # how files of an unfinished write begin; no part of a key may
_PIECE_BYTES = 16 << 20
_PROBE_S = 4.0  # for all operations of a probe together


class StoreError(ValueError):
    """The store cannot do what was asked: says which store, what is wrong and what to do."""


class StoreFullError(StoreError, DiskFullError):
    """The disk of a local store is full."""


class StoreAwayError(StoreError):
    """The store's server was away for longer than it is waited for."""


class StorePathError(StoreError):
    """In a local store a file is where a folder must be, or a folder where a file must be: waiting does not help."""


class StoreKeyError(StoreError, KeyError):
    """No object of this key in the store."""

    __str__ = ValueError.__str__  # KeyError would print the repr


class Store(ABC):
    """A place that holds objects by key. `uri` is an absolute folder or `s3://bucket/prefix`.

    `patience_s` is how long a store on a server is waited for while it is away; whatever is made from a store (`at`, a
    copy in another process) has the patience of the store.
    """

    uri: str
    is_local: bool
    patience_s: float = PATIENCE_S

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether of several writers with `if_absent` exactly one wins. Where not, the user is told once."""

    @abstractmethod
    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """Writes an object whole or not at all; with `if_absent`, False if another one was there first.

        A write whose answer was lost is tried again, and counts as ours if these bytes are found there then. Where the
        store is not `conditional`, `if_absent` may overwrite.
        """

    def ensure(self, key: str, data: bytes | Path) -> bool:
        """Makes an object hold these bytes, whoever else does the same: True if this call wrote them.

        Other bytes (of earlier settings, or damaged) are replaced. Two writers of the same bytes both succeed.
        """
        if self.put(key, data, if_absent=True):
            return True
        return False if self.holds(key, data) else self.put(key, data)

    @abstractmethod
    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """The bytes [start, start + length) of an object, shorter at its end; StoreKeyError if it is missing."""

    @abstractmethod
    def fetch(self, key: str, path: Path) -> None:
        """Copies an object to a local file, which it may leave unfinished when it fails; StoreKeyError if missing."""

    def holds(self, key: str, data: bytes | Path) -> bool:
        """Whether there is an object of exactly these bytes."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if self.head(key) != size:
            return False
        # A complete object is compared with its checksum on the way, a range of it is not.
        length = _PIECE_BYTES if size > _PIECE_BYTES else None
        try:
            with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
                return all(
                    self.get(key, start=start, length=length) == file.read(_PIECE_BYTES)
                    for start in range(0, size, _PIECE_BYTES)
                )
        except StoreKeyError:  # deleted meanwhile
            return False

    @abstractmethod
    def head(self, key: str) -> int | None:
        """The object's size in bytes; None if it is missing."""

    @abstractmethod
    def tag(self, key: str) -> str:
        """A short text that changes when the object is replaced; StoreKeyError if it is missing."""

    @abstractmethod
    def age_s(self, key: str) -> float:
        """Seconds since an object was written, by the store's own clock; StoreKeyError if it is missing."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[str]:
        """All keys that begin with `prefix`, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; a missing one is no error."""

    @abstractmethod
    def clean(self, *, older_than_s: float) -> tuple[str, ...]:
        """Removes what killed writers left behind half-done, if it was begun longer ago: the keys it was to be."""

    @abstractmethod
    def path(self, key: str) -> Path | None:
        """The local file of an object; None where objects are not files."""

    @abstractmethod
    def at(self, *parts: str) -> Self:
        """The part of this store below `parts`."""

    @abstractmethod
    def with_patience(self, total_s: float) -> Self:
        """This store for operations that together begin their last attempt within `total_s` from now.

        What they find out about an outage is still reported with `patience_s`, which is that of the user.
        """

    def check(self) -> None:
        """Writes, reads and deletes a probe object; StoreError within 15 s, naming what is wrong."""
        key, data = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        probe = self.with_patience(_PROBE_S)
        probe.put(key, data, if_absent=True)
        try:
            if probe.get(key) != data:
                raise StoreError(f"{self.uri} gave back other bytes than were written: use another store")
        finally:
            with contextlib.suppress(StoreError):
                probe.delete(key)
        _ = probe.conditional  # tells where it is not

    def reach(self) -> None:
        """Looks for an object, and writes nothing; StoreError within 15 s where nobody answers."""
        self.with_patience(_PROBE_S).head(".probe")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)


def checked_key(key: str) -> str:
    """The key itself; StoreError where it is not one."""
    if not isinstance(key, str) or "\0" in key:  # from a file that anybody may have written
        raise StoreError(f"{key!r} is not a key: a key is text without a zero byte")
    parts = PurePosixPath(key).parts
    plain = bool(key) and not key.startswith("/") and ".." not in parts and "/".join(parts) == key
    if not plain or any(part.startswith(UNFINISHED) for part in parts):
        raise StoreError(f"{key!r} is not a key: a key is parts joined by single '/', without '..' or a leading '/'")
    return key
