"""The files of an image set, wherever they are: a folder, a tar, a zip, or below an s3:// prefix.

Zips among them count as if they had been unpacked where they are, and links as what they lead to. What must be at hand
(an archive or .npz from S3, a zip inside a zip, unpacked arrays) is kept once per machine in a cache folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import posixpath
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from data_shards.source.files.litter import left_out, note_of
from data_shards.source.files.ranged_file import RangedFile
from data_shards.store import StoreError, open_store
from data_shards.store.disk import DiskFullError, full_disk, is_full, says_full, size_text
from data_shards.store.s3.store import S3Store

# Published sets have one zip in another; archives that hold themselves have no end.
_DEEPEST_ZIP = 3


class Files(Protocol):
    """Named files; names are relative, '/'-separated and sorted, without hidden ones. `folders` may be empty ones.

    A link to a file is a file, one to a folder has all that is below it, and one to nothing is an OSError when read.
    """

    names: list[str]
    folders: list[str]
    notes: tuple[str, ...]
    """What is not among the names and why, a sentence each, for the owner of the files."""
    broken: dict[str, str]
    """Those of the names that are links to nothing, and why: nobody knows whether a file or a folder was meant."""

    def read(self, name: str) -> bytes:
        """The whole file."""
        ...

    def local(self, name: str) -> Path:
        """The file as one on this machine, fetched or unpacked into the cache where it is none yet."""
        ...

    def open(self, name: str, *, buffer_bytes: int) -> BinaryIO:
        """The file, of which only what is asked for is read, `buffer_bytes` at least; of a zip's member all."""
        ...

    def stamp(self, name: str) -> str:
        """A text that changes when the file is replaced, found without reading it; "" where it cannot be known."""
        ...


def open_files(uri: str) -> Files:
    """The files of a folder, a .tar, a .zip, or an s3:// prefix, those inside of zips too.

    ValueError if there is nothing, no such kind, or an archive is damaged or hostile.
    """
    return _with_those_in_zips(_open(uri), uri)


def _open(uri: str) -> Files:
    if uri.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")):
        raise ValueError(
            f"{uri} is compressed, so single images cannot be read out of it: unpack it, to a folder or a .tar"
        )
    if uri.lower().endswith(".tar"):
        from data_shards.source.files.tar import TarFiles

        return TarFiles(path := local_copy(uri), copy_stamp(uri, path))
    if uri.lower().endswith(".zip"):
        from data_shards.source.files.zip import ZipFiles

        return ZipFiles(local_copy(uri))
    if uri.startswith("s3://"):
        store = open_store(uri)
        assert isinstance(store, S3Store), uri
        return StoreFiles(store)
    folder = _local(uri)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file of no known kind: a source is a folder, .zip, .tar, .csv, .xlsx or .npz")
    from data_shards.source.files.folder import FolderFiles

    return FolderFiles(folder)


def _with_those_in_zips(files: Files, called: str, depth: int = 0) -> Files:
    zips = [name for name in files.names if name.lower().endswith(".zip")]
    if not zips:
        return files
    if depth == _DEEPEST_ZIP:
        raise ValueError(
            f"{zips[0]!r} lies in a zip, in a zip, in a zip of {called}: they are followed {_DEEPEST_ZIP} deep, so "
            "unpack it and give the folder"
        )
    from data_shards.source.files.zip import ZipFiles

    inner = {}
    for name in zips:
        where = f"{called}/{name}"
        inner[name] = _with_those_in_zips(ZipFiles(files.local(name), called=where), where, depth + 1)
    return NestedFiles(files, inner, called)


class NestedFiles:
    """Files, and those of the zips among them at the paths that unpacking each zip beside itself would give.

    Where somebody has done so and kept the zip, the unpacked file counts, once.
    """

    def __init__(self, outer: Files, zips: dict[str, Files], called: str):
        self.zips = sorted(zips)
        self._homes = {name: (outer, name) for name in outer.names if name not in zips}
        unpacked = set(self._homes)
        folders = list(outer.folders)
        for zip_name, files in zips.items():
            folder = posixpath.dirname(zip_name)
            folders += [posixpath.join(folder, each) for each in files.folders]
            for name in files.names:
                path = posixpath.join(folder, name)
                if path in unpacked:
                    continue
                if path in self._homes:
                    raise ValueError(
                        f"two zips of {called} hold {path!r}: a name may stand once, so remove one of them or unpack "
                        "them to folders of their own"
                    )
                self._homes[path] = (files, name)
        self.names, self.folders = sorted(self._homes), with_parents(folders, self._homes)
        inner = (f"in {zip_name}: {note}" for zip_name, files in zips.items() for note in files.notes)
        self.notes = (*outer.notes, *inner)
        self.broken = {path: files.broken[name] for path, (files, name) in self._homes.items() if name in files.broken}

    def read(self, name: str) -> bytes:
        """The whole file."""
        files, inside = self._homes[name]
        return files.read(inside)

    def open(self, name: str, *, buffer_bytes: int) -> BinaryIO:
        """See Files."""
        files, inside = self._homes[name]
        return files.open(inside, buffer_bytes=buffer_bytes)

    def local(self, name: str) -> Path:
        """See Files."""
        files, inside = self._homes[name]
        return files.local(inside)

    def stamp(self, name: str) -> str:
        """See Files."""
        files, inside = self._homes[name]
        return files.stamp(inside)


class StoreFiles:
    """The objects below an s3:// prefix, each fetched when it is read."""

    def __init__(self, store: S3Store):
        self._store = store
        tags, litter = {}, set()
        for key, tag in store.raw_tags():
            if outside := left_out(key, folder=key.endswith("/")):
                litter.add(outside)
            else:
                tags[key] = tag
        keys = list(tags)
        self.notes = note_of(litter)
        self.broken: dict[str, str] = {}
        self.names = [key for key in keys if key and not key.endswith("/")]
        self._tags = {name: tags[name] for name in self.names}
        if not self.names:
            raise ValueError(f"{store.uri} was not found: there is no object; check --data.source")
        self.folders = with_parents([key.rstrip("/") for key in keys if key.endswith("/")], self.names)

    def read(self, name: str) -> bytes:
        """The whole object."""
        return self._store.get(name)

    def local(self, name: str) -> Path:
        """See Files."""
        return local_copy(f"{self._store.uri}/{name}")

    def open(self, name: str, *, buffer_bytes: int) -> BinaryIO:
        """The object, of which only what is asked for is fetched."""
        parts = RangedFile(functools.partial(self._part, name), functools.partial(self._size, name))
        return io.BufferedReader(parts, buffer_bytes)

    def stamp(self, name: str) -> str:
        """See Files: the ETag that the object had when the prefix was listed."""
        tag = self._tags[name]
        return f"{self._store.uri}/{name}|{tag}" if tag else ""

    def _part(self, name: str, start: int, length: int) -> bytes:
        return self._store.get(name, start=start, length=length)

    def _size(self, name: str) -> int:
        size = self._store.head(name)
        if size is None:
            raise StoreError(f"{self._store.uri}/{name} was there when it was listed and is no more: run again")
        return size


def with_parents(folders: Iterable[str], names: Iterable[str]) -> list[str]:
    """The folders, and all folders that the files lie in."""
    parents = {str(parent) for name in (*folders, *names) for parent in PurePosixPath(name).parents}
    return sorted({*folders, *parents} - {"."})


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
        path = _local(uri)
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


def _local(uri: str) -> Path:
    path = Path(open_store(uri).uri)
    if not path.exists():
        raise ValueError(f"{path} was not found; check --data.source")
    return path
