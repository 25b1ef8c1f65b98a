"""The files of an image set with zips among them."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import BinaryIO

from data_shards.source.files.files import Files, with_parents


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
