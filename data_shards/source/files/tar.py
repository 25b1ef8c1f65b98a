"""The members of an uncompressed tar, read at their offsets."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_shards.source.files.archive import ArchiveReader, Unpacked, archive_identity
from data_shards.source.files.cache import LocalFile, file_stamp
from data_shards.source.files.files import Broken, Files, with_parents
from data_shards.source.files.links import ENDLESS_NOTE, NOWHERE, follow
from data_shards.source.files.litter import named_note, note_of, without_litter
from data_shards.source.files.ranged_file import RangedFile

_PART_BYTES = 64 << 20


class _Place(NamedTuple):
    """Location of a file's bytes: `parts` (start in the file, length) follow each other from `offset`.

    Gaps between the parts of a sparse file are zeros.
    """

    offset: int
    size: int
    parts: tuple[tuple[int, int], ...]

    def end(self) -> int:
        return self.offset + sum(length for _, length in self.parts)


class TarReader(ArchiveReader):
    """Reads the members of an uncompressed tar."""

    def __init__(self, archive: LocalFile, stamp: str):
        super().__init__(archive)
        self._stamp = stamp

    def read(self, name: str, place: _Place | Broken) -> bytes:
        """The complete file."""
        place = _readable(place)
        return self._part(place, 0, place.size)

    def open(self, name: str, place: _Place | Broken, *, buffer_bytes: int) -> BinaryIO:
        """The file, read on demand."""
        place = _readable(place)
        size = place.size
        return io.BufferedReader(RangedFile(functools.partial(self._part, place), lambda: size), buffer_bytes)

    def stamp(self, name: str, place: _Place | Broken) -> str:
        """See FileReader: includes the archive's stamp, so all members change when the archive is rewritten."""
        return f"{self._stamp}|{place}" if self._stamp and isinstance(place, _Place) else ""

    def unpack(self, name: str, place: _Place, target: Path) -> None:
        """Writes the file to a path of this machine."""
        with target.open("wb") as out:
            for start in range(0, place.size, _PART_BYTES):
                out.write(self._part(place, start, _PART_BYTES))

    def _part(self, place: _Place, start: int, length: int) -> bytes:
        end = max(start, min(start + length, place.size))
        found, offset = bytearray(end - start), place.offset
        with self.path.open("rb") as file:
            for begin, size in place.parts:
                first, last = max(begin, start), min(begin + size, end)
                if first < last:
                    file.seek(offset + first - begin)
                    found[first - start : last - start] = file.read(last - first)
                offset += size
        return bytes(found)


def _readable(place: _Place | Broken) -> _Place:
    if isinstance(place, Broken):
        raise place.error()
    return place


class TarFiles(Files):
    """The members of an uncompressed tar. If a name appears twice, the last one counts, as when unpacking.

    ValueError if the archive is damaged or truncated, or has names that lead outside it.
    """

    reader: TarReader

    def __init__(self, archive: LocalFile, stamp: str = ""):
        self._path = path = archive.path()
        self.reader = TarReader(archive, stamp or file_stamp(path))
        # Includes litter, because links may point to it.
        self._places: dict[str, _Place] = {}
        self._links: dict[str, str] = {}
        self.broken: dict[str, str] = {}  # hard links among them
        self._folders: set[str] = set()
        self._special: list[str] = []
        self._replaced: set[str] = set()
        ended = self._read_headers()
        if max((place.end() for place in self._places.values()), default=0) > path.stat().st_size:
            raise ValueError(f"{path} ends in the middle of a file; download it again")
        linked = follow(self._places, self._folders, self._links, str(path))
        self._places |= {name: self._places[target] for name, target in linked.files.items()}
        self.broken |= linked.broken
        self.names, litter = without_litter([*self._places, *self.broken])
        self.broken = {name: self.broken[name] for name in self.names if name in self.broken}
        folders, empty = without_litter([*self._folders, *linked.folders], folders=True)
        self.folders = with_parents(folders, self.names)
        self.notes = (
            *note_of(litter | empty),
            *named_note("devices, pipes or sockets are left out", self._special),
            *named_note(ENDLESS_NOTE, linked.endless),
            *named_note("names appear twice in the tar; the last one counts", self._replaced),
            *(() if ended else ("the tar has no end mark, so files may be missing at its end",)),
        )

    def _read_headers(self) -> bool:
        """Whether the archive has an end mark."""
        try:
            with tarfile.open(self._path, "r:") as tar:
                for member in tar:
                    self._add(member)
                return _has_end(tar, self._path)
        except tarfile.TarError as error:
            raise ValueError(
                f"{self._path} is not a complete uncompressed tar ({error}); download it again, or unpack it"
            ) from error

    def _add(self, member: tarfile.TarInfo) -> None:
        name = self._inside(member.name)
        if member.isdir():
            self._folders |= {name} - {"."}
            return
        if not (member.isreg() or member.issym() or member.islnk()):
            self._special.append(name)
            return
        if [entries.pop(name) for entries in (self._places, self._links, self.broken) if name in entries]:
            self._replaced.add(name)
        if member.isreg():
            # typeshed has a list of numbers, but these are pairs.
            parts: Any = member.sparse if member.sparse is not None else [(0, member.size)]
            self._places[name] = _Place(member.offset_data, member.size, tuple(parts))
        elif member.issym():
            self._links[name] = member.linkname
        else:
            self._add_hard_link(name, self._inside(member.linkname))

    def _add_hard_link(self, name: str, target: str) -> None:
        # A hard link means the member packed before it; a later member of that name is another file.
        if target in self._places:
            self._places[name] = self._places[target]
        elif target in self._links:
            self._links[name] = self._links[target]
        else:
            self.broken[name] = NOWHERE

    def _inside(self, name: str) -> str:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ValueError(
                f"{self._path} contains {name!r}, which leads outside it; names in an archive must not have '..': "
                "download it again from its publisher, or pack it again"
            )
        return "/".join(parts) or "."

    def place(self, name: str) -> _Place | Broken:
        """See Files."""
        return Broken(self.broken[name]) if name in self.broken else self._places[name]

    def local(self, name: str) -> Unpacked:
        """See Files."""
        place = _readable(self.place(name))
        identity = f"{archive_identity(self._path)}|{place.offset}"
        return Unpacked(self.reader, name, place, identity, place.size)


def _has_end(tar: tarfile.TarFile, path: Path) -> bool:
    """Whether zeros follow the last member. ValueError if other bytes do: tarfile stops there silently."""
    ended = False
    with path.open("rb") as file:
        file.seek(tar.offset)
        while part := file.read(1 << 20):
            ended = True
            if part.strip(b"\0"):
                raise ValueError(
                    f"{path} has unreadable bytes after its last header, at byte {tar.offset:,}: it is damaged there, "
                    "or two tars were joined; download it again, or unpack it (tar -i) and use the folder as source"
                )
    return ended
