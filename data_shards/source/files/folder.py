"""The files below a local folder."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_shards.source.files.cache import OnDisk, file_stamp, on_disk
from data_shards.source.files.files import Files
from data_shards.source.files.links import ENDLESS, ENDLESS_NOTE, MOST_LINKED, NOWHERE
from data_shards.source.files.litter import left_out, named_note, note_of


class _Listing(NamedTuple):
    """A folder to list: its path in the set, its real path, and the real paths of it and its parents."""

    below: str
    real: str
    above: frozenset[str]
    linked: bool
    """Whether a link led here."""


@dataclass(frozen=True)
class FolderReader:
    """Reads the files below a local folder."""

    folder: Path

    def read(self, name: str, place: None = None) -> bytes:
        """The complete file."""
        with self.open(name, buffer_bytes=-1) as file:
            return file.read()

    def open(self, name: str, place: None = None, *, buffer_bytes: int) -> BinaryIO:
        """See FileReader."""
        path = self.folder / name
        try:
            return path.open("rb", buffering=buffer_bytes)
        except OSError as error:
            if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
                raise OSError(error.errno, NOWHERE if error.errno == errno.ENOENT else ENDLESS) from error
            raise

    def stamp(self, name: str, place: None = None) -> str:
        """See FileReader; for a link, the stamp of its target."""
        return file_stamp(self.folder / name)


class FolderFiles(Files):
    """The files below a local folder; links are followed anywhere, except in cycles.

    ValueError if a folder cannot be read: its images would be missing silently.
    """

    def __init__(self, folder: Path):
        self._folder, self.reader = folder, FolderReader(folder)
        self._litter: set[str] = set()
        self._endless: list[str] = []
        self._special: list[str] = []
        self._num_linked = 0
        self.names: list[str] = []
        self.folders: list[str] = []
        self.broken: dict[str, str] = {}
        real = os.path.realpath(folder)
        todo = [_Listing("", real, frozenset([real]), False)]
        while todo:
            todo += self._listed(todo.pop())
        self.names.sort()
        self.folders.sort()
        self.notes = (
            *note_of(self._litter),
            *named_note("devices, pipes or sockets are left out", self._special),
            *named_note(ENDLESS_NOTE, self._endless),
        )

    def _listed(self, at: _Listing) -> list[_Listing]:
        """Lists one folder and returns its subfolders, to be listed next."""
        folders = []
        try:
            with os.scandir(at.real) as entries:
                for entry in entries:
                    name = f"{at.below}/{entry.name}" if at.below else entry.name
                    kind = _kind(entry)
                    if left_out(entry.name, folder=kind == "folder"):
                        self._litter.add(name)
                    elif kind == "file":
                        self.names.append(name)
                        if entry.is_symlink() and not os.path.exists(entry.path):
                            self.broken[name] = _why_broken(entry.path)
                    elif kind == "special":
                        self._special.append(name)
                    else:
                        folders += self._followed(name, entry, at)
        except OSError as error:
            raise ValueError(
                f"folder {self._folder / at.below} cannot be read ({error.strerror or error}), so its images would be "
                "missing; make it readable or move it away"
            ) from error
        return folders

    def _followed(self, name: str, entry: os.DirEntry[str], at: _Listing) -> list[_Listing]:
        linked = entry.is_symlink()
        # Relative to the real folder: resolving a path through many links takes milliseconds.
        real = os.path.realpath(entry.path) if linked else f"{at.real}/{entry.name}"
        if linked and real in at.above:
            self._endless.append(name)
            return []
        self._num_linked += linked and at.linked
        if self._num_linked > MOST_LINKED:
            raise ValueError(
                f"the links below {self._folder} lead through each other to more than {MOST_LINKED:,} folders; remove "
                "unnecessary links, or replace them with copies of their targets"
            )
        self.folders.append(name)
        return [_Listing(name, real, at.above | {real}, linked or at.linked)]

    def place(self, name: str) -> None:
        """See Files: None, because the name is enough."""

    def local(self, name: str) -> OnDisk:
        """See Files."""
        return on_disk(self._folder / name)


def _why_broken(path: str) -> str:
    try:
        os.stat(path)
    except OSError as error:
        return {errno.ELOOP: ENDLESS, errno.ENOENT: NOWHERE}.get(error.errno or 0, error.strerror or "")
    return NOWHERE


def _kind(entry: os.DirEntry[str]) -> str:
    """file, folder or special; a link has the kind of its target, a broken link is a file."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "file" if entry.is_symlink() and not os.path.exists(entry.path) else "special"
    except OSError:  # a link to itself, or to a folder without permission
        return "file"
