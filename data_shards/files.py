"""The files of an image set, wherever they lie: a folder, a tar, or below an s3:// prefix.

What must be at hand (a tar or .npz from S3, unpacked arrays) is kept once per machine in a cache folder.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

from data_shards.store import S3Store, StoreError, open_store

_PART_BYTES = 64 << 20
_JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini")


class Files(Protocol):
    """Named files; names are relative, '/'-separated and sorted, without hidden ones. `folders` may be empty ones."""

    names: list[str]
    folders: list[str]

    def read(self, name: str) -> bytes:
        """The whole file."""
        ...


def open_files(uri: str) -> Files:
    """The files of a folder, a .tar, or an s3:// prefix. ValueError if there is nothing, or no such kind."""
    if uri.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar")):
        raise ValueError(
            f"{uri} is compressed, so single images cannot be read out of it: unpack it, to a folder or a .tar"
        )
    if uri.lower().endswith(".tar"):
        return TarFiles(local_copy(uri))
    if uri.startswith("s3://"):
        store = open_store(uri)
        assert isinstance(store, S3Store), uri
        return StoreFiles(store)
    folder = _local(uri)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file of no known kind: a source is a folder, a .tar, a .csv or an .npz")
    return FolderFiles(folder)


class FolderFiles:
    """The files below a local folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        names, inside = [], []
        for where, folders, files in os.walk(folder, followlinks=True):
            folders[:] = [name for name in folders if not hidden(name)]
            below = Path(where).relative_to(folder)
            names += [(below / name).as_posix() for name in files if not hidden(name)]
            inside += [(below / name).as_posix() for name in folders]
        self.names, self.folders = sorted(names), sorted(inside)

    def read(self, name: str) -> bytes:
        """The whole file."""
        return (self._folder / name).read_bytes()


class TarFiles:
    """The members of an uncompressed tar, read at their offsets."""

    def __init__(self, path: Path):
        self._path, self._size = path, path.stat().st_size
        self._places: dict[str, tuple[int, int]] = {}
        folders = []
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    name = str(PurePosixPath(member.name))
                    if name == "." or any(hidden(part) for part in PurePosixPath(name).parts):
                        continue
                    if member.isreg():
                        self._places[name] = (member.offset_data, member.size)
                    elif member.isdir():
                        folders.append(name)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no whole uncompressed tar ({error}): get it again, or unpack it") from error
        ends = [offset + size for offset, size in self._places.values()]
        if max(ends, default=0) > self._size:
            raise ValueError(f"{path} ends in the middle of a file: get it again")
        self.names, self.folders = sorted(self._places), with_parents(folders, self._places)

    def read(self, name: str) -> bytes:
        """The whole file."""
        offset, size = self._places[name]
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class StoreFiles:
    """The objects below an s3:// prefix, each fetched when it is read."""

    def __init__(self, store: S3Store):
        self._store = store
        keys = [key for key in store.raw_keys() if not any(hidden(part) for part in PurePosixPath(key).parts)]
        self.names = [key for key in keys if key and not key.endswith("/")]
        if not self.names:
            raise ValueError(f"{store.uri} is no such source: no objects lie there; check --data.source")
        self.folders = with_parents([key.rstrip("/") for key in keys if key.endswith("/")], self.names)

    def read(self, name: str) -> bytes:
        """The whole object."""
        return self._store.get(name)


def with_parents(folders: Iterable[str], names: Iterable[str]) -> list[str]:
    """The folders, and all folders that the files lie in."""
    parents = {str(parent) for name in (*folders, *names) for parent in PurePosixPath(name).parents}
    return sorted({*folders, *parents} - {"."})


def hidden(name: str) -> bool:
    """Whether a file or folder is no part of the set: dot files, notebooks' checkpoints, other systems' litter."""
    return name.startswith(".") or name in _JUNK


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
        raise ValueError(f"{uri} is no such source: there is no such object; check --data.source")
    # A replaced object has another tag, so an old copy is never taken for the new one.
    identity = f"{uri}|{size}|{store.tag(name)}"

    def fetch(target: Path) -> None:
        with target.open("wb") as out:
            for start in range(0, size, _PART_BYTES):
                out.write(store.get(name, start=start, length=_PART_BYTES))
        if target.stat().st_size != size:
            raise StoreError(f"{uri} changed while it was fetched: run again when it is whole")

    return cached(f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}/{name}", fetch)


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """The file `key` of the machine's cache; `write` makes it if it is missing. Never half-written."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medmamba" / "sources"
    target = root / key
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".tmp-{secrets.token_hex(8)}")
        try:
            write(beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    return target


def _local(uri: str) -> Path:
    path = Path(open_store(uri).uri)
    if not path.exists():
        raise ValueError(f"{path} is no such source: nothing lies there; check --data.source")
    return path
