"""The machine's cache of files that must be local, and stamps that show whether a file was replaced."""

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
    """A text that changes when the source `uri` is replaced; `path` is its local file (`local_file`).

    For an s3:// object it is equal on all machines: the cache folder is named by address, size and tag.
    """
    return f"{uri}|{path.parent.name}" if uri.startswith("s3://") else file_stamp(path)


def file_stamp(path: Path) -> str:
    """A text that changes when a local file is replaced or written to; "" if the file cannot be accessed.

    It includes ctime, which programs cannot set; `cp -p` and rsync set mtime.
    """
    try:
        found = path.stat()
    except OSError:  # reported when the image is read
        return ""
    return f"{path.absolute()}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"


class LocalFile(Protocol):
    """A file that any machine can make available locally. Picklable."""

    def path(self) -> Path:
        """Its path on this machine; fetches or unpacks it first if necessary."""
        ...


@dataclass(frozen=True)
class OnDisk:
    """A file on a local or shared disk."""

    place: Path
    size_bytes: int
    mtime_ns: int

    def path(self) -> Path:
        """See LocalFile. StoreError if the file has been replaced or is gone."""
        try:
            found = self.place.stat()
        except OSError as error:
            raise StoreError(f"{self.place} was listed but can no longer be found: {error}") from error
        if (found.st_size, found.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
            raise StoreError(f"{self.place} changed while it was read; rerun when it is complete")
        return self.place


def on_disk(path: Path) -> OnDisk:
    """A local file in its current version. OSError if it cannot be accessed."""
    found = path.stat()
    return OnDisk(path, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Fetched:
    """A fixed version of an s3:// object, fetched once per machine."""

    uri: str
    size_bytes: int
    tag: str | None

    def path(self) -> Path:
        """See LocalFile. StoreError if the object has been replaced."""
        # A replaced object has another tag, so an old copy is never mistaken for the new one.
        identity = f"{self.uri}|{self.size_bytes}|{self.tag}"
        name = self.uri.rpartition("/")[2]
        key = f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}/{name}"
        return cached(key, self._fetch, size_bytes=self.size_bytes)

    def _fetch(self, target: Path) -> None:
        parent, _, name = self.uri.rpartition("/")
        store = open_store(parent)
        store.fetch(name, target)
        if store.tag(name) != self.tag:
            raise StoreError(f"{self.uri} changed while it was fetched; rerun when it is complete")


def local_file(uri: str) -> LocalFile:
    """The single file `uri` as a local file. ValueError if it is a folder or not found."""
    if not uri.startswith("s3://"):
        path = local_path(uri)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, but this layout needs a file; set --data.source to the file")
        return on_disk(path)
    parent, _, name = uri.rpartition("/")
    store = open_store(parent)
    size = store.head(name)
    if size is None:
        raise ValueError(f"{uri} was not found: no object has this key; check --data.source")
    return Fetched(uri, size, store.tag(name))


def cached(key: str, write: Callable[[Path], None], *, size_bytes: int | None = None) -> Path:
    """The file `key` of the machine's cache; `write` creates it if missing. Never partly written.

    DiskFullError if the disk has no room for it; `size_bytes`, if known, is the required space.
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
            temporary = target.with_name(f".tmp-{secrets.token_hex(8)}")
            try:
                write(temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lets one process per folder write: the shard tasks of a node start together and may need gigabytes unpacked.

    A kernel lock, which a killed process releases. On file systems without locks each process writes its own copy and
    the last one stays, which is also correct.
    """
    with (folder / ".lock").open("wb") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def local_path(uri: str) -> Path:
    """The path of a local source. ValueError if it does not exist."""
    path = Path(open_store(uri).uri)
    if not path.exists():
        raise ValueError(f"{path} was not found; check --data.source")
    return path
