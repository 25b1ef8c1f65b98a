"""The files of an image set that contains zips."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from data_shards.source.files.cache import LocalFile
from data_shards.source.files.files import FileReader, Files, with_parents


class _Place(NamedTuple):
    """Index of the reader that has the file, and the file's name and place there."""

    reader: int
    name: str
    place: Any


@dataclass(frozen=True)
class NestedReader:
    """Reads files, including those inside zips."""

    readers: tuple[FileReader, ...]

    def read(self, name: str, place: _Place) -> bytes:
        """The complete file."""
        return self.readers[place.reader].read(place.name, place.place)

    def open(self, name: str, place: _Place, *, buffer_bytes: int) -> BinaryIO:
        """See FileReader."""
        return self.readers[place.reader].open(place.name, place.place, buffer_bytes=buffer_bytes)

    def stamp(self, name: str, place: _Place) -> str:
        """See FileReader."""
        return self.readers[place.reader].stamp(place.name, place.place)


class NestedFiles(Files):
    """Files, including those inside zips, at the paths they would have if each zip were unpacked next to itself.

    If a zip has already been unpacked and kept, only the unpacked file counts.
    """

    def __init__(self, outer: Files, zips: dict[str, Files], called: str):
        self.zips = sorted(zips)
        among = [outer, *zips.values()]
        self._numbers = {id(files): number for number, files in enumerate(among)}
        self.reader = NestedReader(tuple(files.reader for files in among))
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
                        f"two zips of {called} contain {path!r}, but names must be unique; remove one zip, or unpack "
                        "them to separate folders"
                    )
                self._homes[path] = (files, name)
        self.names, self.folders = sorted(self._homes), with_parents(folders, self._homes)
        inner = (f"in {zip_name}: {note}" for zip_name, files in zips.items() for note in files.notes)
        self.notes = (*outer.notes, *inner)
        self.broken = {path: files.broken[name] for path, (files, name) in self._homes.items() if name in files.broken}

    def place(self, name: str) -> _Place:
        """See Files."""
        files, inside = self._homes[name]
        return _Place(self._numbers[id(files)], inside, files.place(inside))

    def local(self, name: str) -> LocalFile:
        """See Files."""
        files, inside = self._homes[name]
        return files.local(inside)
