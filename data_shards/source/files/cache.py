"""The machine's cache of what must be at hand as a local file, and the stamps by which a replaced file is known."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_shards.store import StoreError, open_store
from data_shards.store.disk import DiskFullError, full_disk, is_full, says_full, size_text


def copy_stamp(uri: str, path: Path) -> str:
    """A text that changes when the source `uri` is replaced, of which `path` is the local file (`local_file`).

    That of an s3:// object is the same on every machine: its copies lie in a folder named after address, size and tag.
    """
    return f"{uri}|{path.parent.name}" if uri.startswith("s3://") else file_stamp(path)


def file_stamp(path: Path) -> str:
    """A text that changes when a local file is replaced or written to; "" where it cannot be looked at.

    With the time of its last change of any kind, which no program sets back, as `cp -p` and rsync do with the other.
    """
    try:
        found = path.stat()
    except OSError:  # reported when the image is read
        return ""
    return f"{path.absolute()}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"


class LocalFile(Protocol):
    """A file that every machine can have at hand. It can be pickled."""

    def path(self) -> Path:
        """Where it is on this machine; it is fetched or unpacked there first, if need be."""
        ...


@dataclass(frozen=True)
class OnDisk:
    """A file that is local already, or on a disk that all machines share."""

    place: Path
    size_bytes: int
    mtime_ns: int

    def path(self) -> Path:
        """See LocalFile. StoreError where the file is another one by now, or is gone."""
        try:
            found = self.place.stat()
        except OSError as error:
            raise StoreError(f"{self.place} was there when it was listed and cannot be found now: {error}") from error
        if (found.st_size, found.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
            raise StoreError(f"{self.place} changed while it was read: run again when it is complete")
        return self.place


def on_disk(path: Path) -> OnDisk:
    """A local file in the version that it has now. OSError where it cannot be looked at."""
    found = path.stat()
    return OnDisk(path, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Fetched:
    """An s3:// object in the version that it had when it was first looked at, fetched once per machine."""

    uri: str
    size_bytes: int
    tag: str | None

    def path(self) -> Path:
        """See LocalFile. StoreError where the object is another one by now."""
        # A replaced object has another tag, so an old copy is never taken for the new one.
        identity = f"{self.uri}|{self.size_bytes}|{self.tag}"
        name = self.uri.rpartition("/")[2]
        key = f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}/{name}"
        return cached(key, self._fetch, size_bytes=self.size_bytes)

    def _fetch(self, target: Path) -> None:
        parent, _, name = self.uri.rpartition("/")
        store = open_store(parent)
        store.fetch(name, target)
        if store.tag(name) != self.tag:
            raise StoreError(f"{self.uri} changed while it was fetched: run again when it is complete")


def local_file(uri: str) -> LocalFile:
    """The source `uri`, which is one file, as a local one. ValueError where it is a folder or is not there."""
    if not uri.startswith("s3://"):
        path = local_path(uri)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, but this layout is one file: name the file in --data.source")
        return on_disk(path)
    parent, _, name = uri.rpartition("/")
    store = open_store(parent)
    size = store.head(name)
    if size is None:
        raise ValueError(f"{uri} was not found: no object has this key; check --data.source")
    return Fetched(uri, size, store.tag(name))


def cached(key: str, write: Callable[[Path], None], *, size_bytes: int | None = None) -> Path:
    """The file `key` of the machine's cache; `write` makes it if it is missing. Never half-written.

    DiskFullError where the disk has no room for it; `size_bytes`, where known, is the room that it needs.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medmamba" / "sources"
    target = root / key
    try:
        return _cached(target, write)
    except (OSError, StoreError) as error:
        if isinstance(error, DiskFullError) or not (says_full(error) or is_full(root)):
            raise
        needed = "" if size_bytes is None else f"{size_text(size_bytes)} needed"
        line = full_disk(root, "the copy of a source", needed)
        raise DiskFullError(f"{line}, or set XDG_CACHE_HOME to a folder on another disk") from error


def _cached(target: Path, write: Callable[[Path], None]) -> Path:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(target.parent):
            if target.exists():
                return target
            beside = target.with_name(f".tmp-{secrets.token_hex(8)}")
            try:
                write(beside)
                os.replace(beside, target)
            finally:
                beside.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """The shard tasks of a node begin together; gigabytes are unpacked by the first while the others wait.

    A lock of the kernel's, so that a killed process leaves none behind. Where the file system knows no locks each
    writes its own copy and the last one stays, which is as correct.
    """
    with (folder / ".lock").open("wb") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def local_path(uri: str) -> Path:
    """The path of a local source. ValueError where nothing is there."""
    path = Path(open_store(uri).uri)
    if not path.exists():
        raise ValueError(f"{path} was not found; check --data.source")
    return path
