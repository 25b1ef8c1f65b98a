"""The common interface of folders, archives and stores with the files of an image set."""

from __future__ import annotations

import abc
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol

from data_shards.source.files.cache import LocalFile


class FileReader(Protocol):
    """Reads files by name and place. Picklable for any machine; holds nothing per file."""

    def read(self, name: str, place: Any) -> bytes:
        """The complete file. OSError if it cannot be read."""
        ...

    def open(self, name: str, place: Any, *, buffer_bytes: int) -> BinaryIO:
        """The file, read on demand in pieces of at least `buffer_bytes`; a member of a zip is read completely."""
        ...

    def stamp(self, name: str, place: Any) -> str:
        """A text that changes when the file is replaced, found without reading it; "" if unknown."""
        ...


@dataclass(frozen=True, slots=True)
class Broken:
    """The place of a broken link, with the reason."""

    why: str

    def error(self) -> OSError:
        """The error raised by reading it."""
        return OSError(errno.ENOENT, self.why)


class Files(abc.ABC):
    """Named files. Names are relative, '/'-separated and sorted, without hidden files; `folders` may be empty.

    Links are resolved: a link to a file is a file, a link to a folder has its contents, and reading a broken link
    raises OSError.
    """

    names: list[str]
    folders: list[str]
    notes: tuple[str, ...]
    """Messages for the user about files that are left out, one sentence each."""
    broken: dict[str, str]
    """Names that are broken links, with the reason; each may be meant as a file or a folder."""
    reader: FileReader

    @abc.abstractmethod
    def place(self, name: str) -> Any:
        """Data with which the reader finds this file; picklable."""

    @abc.abstractmethod
    def local(self, name: str) -> LocalFile:
        """The file as a local file on any machine, fetched or unpacked into the cache if necessary."""

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
    """The folders, and all parent folders of the files."""
    parents = {str(parent) for name in (*folders, *names) for parent in PurePosixPath(name).parents}
    return sorted({*folders, *parents} - {"."})
