"""What the readers of a tar and of a zip share: the archive's local file, and members that are unpacked from it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from data_shards.source.files.cache import LocalFile, cached


class ArchiveReader:
    """Opens the archive when it is first asked for, once in each process."""

    def __init__(self, archive: LocalFile):
        self.archive = archive

    @functools.cached_property
    def path(self) -> Path:
        """The archive on this machine."""
        return self.archive.path()

    def __getstate__(self) -> dict[str, Any]:
        # Another machine has it elsewhere, and another process opens it itself.
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
    """What names its content: the archive's path, size and time, and where in it the member is."""
    size_bytes: int | None = None
    """The room that it needs, where that is to be told if there is none."""

    def path(self) -> Path:
        """See LocalFile."""
        key = f"{hashlib.sha256(self.identity.encode()).hexdigest()[:24]}/{PurePosixPath(self.name).name}"
        return cached(key, lambda target: self.reader.unpack(self.name, self.place, target), size_bytes=self.size_bytes)


def archive_identity(path: Path) -> str:
    """What changes when an archive on this machine is written again."""
    found = path.stat()
    return f"{path.resolve()}|{found.st_size}|{found.st_mtime_ns}"
