"""Shared by the tar and zip readers: the archive's local file, and members unpacked from it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from data_shards.source.files.cache import LocalFile, cached


class ArchiveReader:
    """Opens the archive on first use, once per process."""

    def __init__(self, archive: LocalFile):
        self.archive = archive

    @functools.cached_property
    def path(self) -> Path:
        """The archive on this machine."""
        return self.archive.path()

    def __getstate__(self) -> dict[str, Any]:
        # Paths differ between machines, and each process opens its own file.
        return {name: value for name, value in self.__dict__.items() if name not in ("path", "_file")}


class _Unpacks(Protocol):
    def unpack(self, name: str, place: Any, target: Path) -> None: ...


@dataclass(frozen=True)
class Unpacked:
    """A member of an archive as a local file, unpacked once per machine."""

    reader: _Unpacks
    name: str
    place: Any
    identity: str
    """Identifies its content: the archive's path, size and time, and the member's position."""
    size_bytes: int | None = None
    """Required disk space, for the message about a full disk."""

    def path(self) -> Path:
        """See LocalFile."""
        key = f"{hashlib.sha256(self.identity.encode()).hexdigest()[:24]}/{PurePosixPath(self.name).name}"
        return cached(key, lambda target: self.reader.unpack(self.name, self.place, target), size_bytes=self.size_bytes)


def archive_identity(path: Path) -> str:
    """A text that changes when an archive on this machine is rewritten."""
    found = path.stat()
    return f"{path.resolve()}|{found.st_size}|{found.st_mtime_ns}"
