"""The machine's cache of what must be at hand as a local file, and the stamps by which a replaced file is known."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from data_shards.store import StoreError, open_store
from data_shards.store.disk import DiskFullError, full_disk, is_full, says_full, size_text


def copy_stamp(uri: str, path: Path) -> str:
    """A text that changes when the source `uri` is replaced, of which `path` is the local file (`local_copy`).

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


def local_copy(uri: str) -> Path:
    """The local file of a source that is one file; an s3:// object is fetched once per machine."""
    if not uri.startswith("s3://"):
        path = local_path(uri)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, but this layout is one file: name the file in --data.source")
        return path
    parent, _, name = uri.rpartition("/")
    store = open_store(parent)
    size = store.head(name)
    if size is None:
        raise ValueError(f"{uri} was not found: there is no such object; check --data.source")
    # A replaced object has another tag, so an old copy is never taken for the new one.
    tag = store.tag(name)
    identity = f"{uri}|{size}|{tag}"

    def fetch(target: Path) -> None:
        store.fetch(name, target)
        if store.tag(name) != tag:
            raise StoreError(f"{uri} changed while it was fetched: run again when it is whole")

    return cached(f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}/{name}", fetch, size_bytes=size)


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
