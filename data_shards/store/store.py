"""One seam to a folder and to S3: objects by key, whole or by range, never half-written.

Keys are '/'-separated and relative to the store's uri. A store is picklable by its uri; credentials and endpoint
come from the standard AWS variables and files of the process that uses it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from data_shards.store.disk import DiskFullError, full_disk, says_full, size_text
from data_shards.store.outage import PATIENCE_S

# Files of an unfinished write; no key may begin a path component with it.
_UNFINISHED = ".tmp-"
_PIECE_BYTES = 16 << 20
_log = logging.getLogger(__name__)


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

    def at(self, *parts: str) -> Store:
        """The part of this store below `parts`."""
        return open_store("/".join([self.uri, *(checked_key(part) for part in parts)]), patience_s=self.patience_s)

    def check(self) -> None:
        """Writes, reads and deletes a probe object; StoreError within 15 s, naming what is wrong."""
        key, data = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        probe = self._impatient()
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
        self._impatient().head(".probe")

    def _impatient(self) -> Store:
        return self

    def __reduce__(self):
        return _reopened, (self.uri, self.patience_s)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)


def open_store(uri: str, *, patience_s: float = PATIENCE_S) -> Store:
    """The store at a folder ('./x', '/x', 'file:///x') or at 's3://bucket/prefix'. Touches neither disk nor network.

    `patience_s` is how long each read and write waits for a server that is away (see `Store`).
    """
    uri = str(uri)
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise StoreError(f"{uri!r} names no bucket: write s3://bucket/prefix")
        from data_shards.store.s3.store import S3Store

        return S3Store(bucket, "/".join(part for part in prefix.split("/") if part), patience_s=patience_s)
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise StoreError(f"{uri!r} names another host or no folder: write file:///folder with three slashes")
        uri = unquote(parts.path)
    if not uri or "://" in uri:
        raise StoreError(f"{uri!r} is no store: give a folder or s3://bucket/prefix")
    return FileStore(Path(os.path.abspath(os.path.expanduser(uri))))


def _reopened(uri: str, patience_s: float) -> Store:
    return open_store(uri, patience_s=patience_s)


def checked_key(key: str) -> str:
    """The key itself; StoreError where it is none."""
    if not isinstance(key, str) or "\0" in key:  # from a file that anybody may have written
        raise StoreError(f"{key!r} is no key: a key is text without a zero byte")
    parts = PurePosixPath(key).parts
    plain = bool(key) and not key.startswith("/") and ".." not in parts and "/".join(parts) == key
    if not plain or any(part.startswith(_UNFINISHED) for part in parts):
        raise StoreError(f"{key!r} is no key: a key is parts joined by single '/', without '..' or a leading '/'")
    return key


class FileStore(Store):
    """Objects as files below a folder."""

    is_local = True
    conditional = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.uri = str(folder)

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """See Store. Written beside, synced, then put in place: a reader never sees a part of it."""
        target = self.folder / checked_key(key)
        beside = target.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
        with self._errors(f"cannot write {key}", data=data):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with beside.open("wb") as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if not if_absent:
                    os.replace(beside, target)
                    return True
                try:
                    os.link(beside, target)
                except FileExistsError:
                    return False
                return True
            finally:
                with contextlib.suppress(OSError):
                    beside.unlink()

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        with self._errors(f"cannot read {key}", key=key), (self.folder / checked_key(key)).open("rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def fetch(self, key: str, path: Path) -> None:
        source = self.folder / checked_key(key)
        with self._errors(f"cannot read {key}", key=key), source.open("rb") as file, path.open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)

    def head(self, key: str) -> int | None:
        path = self.folder / checked_key(key)
        with self._errors(f"cannot read {key}"):
            return path.stat().st_size if path.is_file() else None

    def tag(self, key: str) -> str:
        with self._errors(f"cannot read {key}", key=key):
            stat = (self.folder / checked_key(key)).stat()
            return f"{stat.st_size}-{stat.st_mtime_ns}"

    def age_s(self, key: str) -> float:
        with self._errors(f"cannot read {key}", key=key):
            return time.time() - (self.folder / checked_key(key)).stat().st_mtime

    def list(self, prefix: str = "") -> Iterator[str]:
        # Only the folder that the prefix leads into can hold matching keys.
        top = self.folder / prefix.rpartition("/")[0]
        with self._errors("cannot list"):
            keys = [
                (Path(folder) / name).relative_to(self.folder).as_posix()
                for folder, _, names in os.walk(top)
                for name in names
                if not name.startswith(_UNFINISHED)
            ]
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._errors(f"cannot delete {key}"):
            (self.folder / checked_key(key)).unlink(missing_ok=True)

    def clean(self, *, older_than_s: float) -> tuple[str, ...]:
        """See Store; the files do not tell which keys they were to be."""
        old = []
        with self._errors("cannot clean"):
            for folder, _, names in os.walk(self.folder):
                for path in (Path(folder) / name for name in names if name.startswith(_UNFINISHED)):
                    with contextlib.suppress(FileNotFoundError):  # its writer has finished meanwhile
                        if time.time() - path.stat().st_mtime >= older_than_s:
                            path.unlink()
                            old.append(path.relative_to(self.folder).as_posix())
        return tuple(sorted(old))

    def path(self, key: str) -> Path:
        return self.folder / checked_key(key)

    @contextlib.contextmanager
    def _errors(self, doing: str, *, key: str | None = None, data: bytes | Path | None = None) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            if key is not None:
                raise StoreKeyError(f"{self.uri} has no object {key}") from error
            if isinstance(error, IsADirectoryError):
                raise StorePathError(
                    f"{self.uri}: {doing}: there is a folder where the file must be "
                    f"({error.filename2 or error.filename}): move it, or use another store"
                ) from error
            raise StoreError(f"{self.uri}: {doing}: {error}") from error
        except (NotADirectoryError, FileExistsError) as error:
            raise StorePathError(
                f"{self.uri}: {doing}: there is a file where a folder must be ({error.filename}): move it, or use "
                "another store"
            ) from error
        except OSError as error:
            if says_full(error):
                raise StoreFullError(self._no_room(doing, data)) from error
            raise StoreError(
                f"{self.uri}: {doing}: {error.strerror or error}; the store must be a folder you may write to: fix "
                "that, or use another store"
            ) from error

    def _no_room(self, doing: str, data: bytes | Path | None) -> str:
        size = None if data is None else data.stat().st_size if isinstance(data, Path) else len(data)
        needed = "" if size is None else f"{size_text(size)} needed for this object"
        what = doing.removeprefix("cannot write ")
        return f"{full_disk(self.uri, what, needed)}, or use another store"


def tell_unconditional(store: Store) -> None:
    """Warns the user of what is not safe on this store."""
    _log.warning(
        "%s ignores conditional writes (If-None-Match), so a lease object must keep two drivers of one dataset, run or "
        "registered model apart, which is less safe: do not start two at once, or use a server with conditional writes",
        store.uri,
    )
