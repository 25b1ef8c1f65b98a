"""What every kind of place that holds the files of an image set has in common."""

from __future__ import annotations

import abc
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol

from data_shards.source.files.cache import LocalFile


class FileReader(Protocol):
    """Reads files at their places. It can be pickled, for any machine; what it needs of a single file is the place."""

    def read(self, name: str, place: Any) -> bytes:
        """The complete file. OSError where it cannot be read."""
        ...

    def open(self, name: str, place: Any, *, buffer_bytes: int) -> BinaryIO:
        """The file, of which only what is asked for is read, `buffer_bytes` at least; of a zip's member all."""
        ...

    def stamp(self, name: str, place: Any) -> str:
        """A text that changes when the file is replaced, found without reading it; "" where it cannot be known."""
        ...


@dataclass(frozen=True, slots=True)
class Broken:
    """The place of a link to nothing, and why it is one."""

    why: str

    def error(self) -> OSError:
        """What reading it raises."""
        return OSError(errno.ENOENT, self.why)


class Files(abc.ABC):
    """Named files; names are relative, '/'-separated and sorted, without hidden ones. `folders` may be empty ones.

    A link to a file is a file, one to a folder has all that is below it, and one to nothing is an OSError when read.
    """

    names: list[str]
    folders: list[str]
    notes: tuple[str, ...]
    """What is not among the names and why, a sentence each, for the owner of the files."""
    broken: dict[str, str]
    """Those of the names that are links to nothing, and why: nobody knows whether a file or a folder was meant."""
    reader: FileReader

    @abc.abstractmethod
    def place(self, name: str) -> Any:
        """What the reader needs to find this file; it can be pickled."""

    @abc.abstractmethod
    def local(self, name: str) -> LocalFile:
        """The file as one on this machine or any other, fetched or unpacked into the cache where it is none yet."""

    def read(self, name: str) -> bytes:
        """The complete file."""
        return self.reader.read(name, self.place(name))

    def open(self, name: str, *, buffer_bytes: int) -> BinaryIO:
        """See FileReader."""
        return self.reader.open(name, self.place(name), buffer_bytes=buffer_bytes)

    def stamp(self, name: str) -> str:
        """See FileReader."""
        return self.reader.stamp(name, self.place(name))


def with_parents(folders: Iterable[str], names: Iterable[str]) -> list[str]:
    """The folders, and all folders that the files lie in."""
    parents = {str(parent) for name in (*folders, *names) for parent in PurePosixPath(name).parents}
    return sorted({*folders, *parents} - {"."})
