"""What every kind of place that holds the files of an image set has in common."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol


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


def with_parents(folders: Iterable[str], names: Iterable[str]) -> list[str]:
    """The folders, and all folders that the files lie in."""
    parents = {str(parent) for name in (*folders, *names) for parent in PurePosixPath(name).parents}
    return sorted({*folders, *parents} - {"."})
