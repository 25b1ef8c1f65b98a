"""The members of a zip, read at their offsets without unpacking; a zip inside it is unpacked once per machine.

The format is PKWARE's APPNOTE. The standard library reads the table of contents; this module checks every entry before
using it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import shutil
import stat
import struct
import unicodedata
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data_shards.source.files.archive import ArchiveReader, Unpacked, archive_identity
from data_shards.source.files.cache import LocalFile
from data_shards.source.files.files import Broken, Files, with_parents
from data_shards.source.files.links import ENDLESS_NOTE, follow
from data_shards.source.files.litter import left_out, named_note, note_of, without_litter

_CHUNK_BYTES = 1 << 20
# Encoded images shrink by a few percent, tables tenfold. Deflate reaches 1:1032, and zip bombs come close to it.
_MOST_SHRUNK = 200
_NEVER_A_BOMB_BYTES = 64 << 20
_HEADER_BYTES = 30
_UNIX = 3  # created on Unix, so the member has Unix file modes
_SPECIAL = {stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
_LONGEST_LINK = 4096
_NAME_IS_UTF8, _ENCRYPTED = 0x800, 0x1
# What the standard library raises on a damaged table of contents.
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, EOFError, IndexError)


@dataclass(frozen=True, slots=True)
class _Member:
    raw_name: bytes
    offset: int
    coded_bytes: int
    size_bytes: int
    crc: int
    deflated: bool


class ZipReader(ArchiveReader):
    """Reads the members of a zip with pread on one handle, which threads and forked processes may share."""

    def __init__(self, archive: LocalFile, called: str):
        super().__init__(archive)
        self._called = called

    @functools.cached_property
    def _file(self) -> io.FileIO:
        file = self.path.open("rb", buffering=0)
        weakref.finalize(self, file.close)
        return file

    def read(self, name: str, place: _Member | Broken) -> bytes:
        """The complete file. OSError if it fails its checksum."""
        return b"".join(self._chunks(_readable(place)))

    def open(self, name: str, place: _Member | Broken, *, buffer_bytes: int) -> BinaryIO:
        """The complete file in memory, because its checksum can only be verified at the end."""
        return io.BytesIO(self.read(name, place))

    def stamp(self, name: str, place: _Member | Broken) -> str:
        """See FileReader: the checksum from the table of contents."""
        return "" if isinstance(place, Broken) else f"{name}|{place.size_bytes}|{place.crc}"

    def unpack(self, name: str, place: _Member, target: Path) -> None:
        """Writes the file to a path of this machine. ValueError if the disk is full or the file is damaged."""
        free = shutil.disk_usage(target.parent).free
        if place.size_bytes > free:
            raise ValueError(
                f"{name} in {self._called} unpacks to {place.size_bytes:,} bytes, but {target.parent} has only "
                f"{free:,} free; free some space, or set XDG_CACHE_HOME to a larger disk"
            )
        try:
            with target.open("wb") as out:
                out.writelines(self._chunks(place))
        except OSError as error:
            raise ValueError(
                f"{name} in {self._called} cannot be unpacked into {target.parent}: "
                f"{error.strerror or error}; download the archive again, or free some space"
            ) from error

    def _chunks(self, member: _Member) -> Iterator[bytes]:
        crc, size = 0, 0
        inflate = zlib.decompressobj(-zlib.MAX_WBITS) if member.deflated else None
        for coded in self._coded(member):
            try:
                # Inflates at most one byte more than declared, which reveals a bomb.
                part = inflate.decompress(coded, member.size_bytes - size + 1) if inflate else coded
            except zlib.error as error:
                raise _damaged() from error
            crc, size = zlib.crc32(part, crc), size + len(part)
            if size > member.size_bytes:
                raise _damaged()
            yield part
        if size != member.size_bytes or crc != member.crc:
            raise _damaged()

    def _coded(self, member: _Member) -> Iterator[bytes]:
        # The local header repeats the name: a damaged table of contents must not change a class folder.
        header = self._pread(_HEADER_BYTES + len(member.raw_name), member.offset)
        if not header.startswith(b"PK\3\4") or header[_HEADER_BYTES:] != member.raw_name:
            raise _damaged()
        at = member.offset + _HEADER_BYTES + sum(struct.unpack_from("<HH", header, 26))
        left = member.coded_bytes
        while left:
            part = self._pread(min(left, _CHUNK_BYTES), at)
            if not part:
                raise _damaged()
            yield part
            at, left = at + len(part), left - len(part)

    def _pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)


def _readable(place: _Member | Broken) -> _Member:
    if isinstance(place, Broken):
        raise place.error()
    return place


class ZipFiles(Files):
    """The members of a zip. `called` is its name in messages, if it was found inside another archive.

    Raises ValueError, with a remedy, if the archive cannot be used; a single damaged member raises OSError when read.
    """

    reader: ZipReader

    def __init__(self, archive: LocalFile, *, called: str = ""):
        self._path = archive.path()
        self._called = called or str(self._path)
        self.reader = ZipReader(archive, self._called)
        # Includes litter, because links may point to it.
        self._members: dict[str, _Member] = {}
        self.broken: dict[str, str] = {}
        folders: list[str] = []
        links: list[str] = []
        special: list[str] = []
        for info in self._contents():
            name = _plain_name(info, self._called)
            kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == _UNIX else 0
            if info.is_dir() or info.orig_filename.endswith("\\"):
                folders.append(name)
            elif kind in _SPECIAL:
                special.append(name)
            elif left_out(name):
                with contextlib.suppress(ValueError):  # read only if a link points to it
                    self._members[name] = _checked(info, name, self._called)
            elif name in self._members:
                raise ValueError(
                    f"{self._called} contains {name!r} twice, but names must be unique; unpack it and keep one of them"
                )
            else:
                self._members[name] = _checked(info, name, self._called)
                links += [name] if kind == stat.S_IFLNK else []
        self._check_places()
        endless = self._follow(links, folders)
        self.names, litter = without_litter([*self._members, *self.broken])
        self.broken = {name: self.broken[name] for name in self.names if name in self.broken}
        folders, empty = without_litter(folders, folders=True)
        self.folders = with_parents(folders, self.names)
        self.notes = (
            *note_of(litter | empty),
            *named_note("devices, pipes or sockets are left out", special),
            *named_note(ENDLESS_NOTE, endless),
        )

    def _follow(self, links: list[str], folders: list[str]) -> list[str]:
        """Adds the targets of links to the members and `folders`; returns the links to a folder that contains them."""
        targets: dict[str, str] = {}
        for name in links:
            try:
                targets[name] = self.read(name).decode() if self._members[name].size_bytes <= _LONGEST_LINK else ""
            except (OSError, UnicodeDecodeError):
                targets[name] = ""
        for name in [name for name, target in targets.items() if not target]:
            self.broken[name] = "a link that is damaged in its zip"
            del targets[name]
        members = {name: member for name, member in self._members.items() if name not in links}
        linked = follow(members, folders, targets, self._called)
        self._members = members | {name: members[target] for name, target in linked.files.items()}
        self.broken |= linked.broken
        folders += linked.folders
        return linked.endless

    def place(self, name: str) -> _Member | Broken:
        """See Files."""
        return Broken(self.broken[name]) if name in self.broken else self._members[name]

    def local(self, name: str) -> Unpacked:
        """See Files."""
        member = _readable(self.place(name))
        identity = f"{archive_identity(self._path)}|{member.offset}|{member.crc}"
        return Unpacked(self.reader, name, member, identity)

    def _contents(self) -> list[zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                return archive.infolist()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._called} has a name that is marked as UTF-8 but is not ({error}); pack it again, or unpack it "
                "and use the folder as source"
            ) from error
        except _DAMAGE as error:
            raise ValueError(f"{self._called} is not a complete zip file ({error}); download it again") from error

    def _check_places(self) -> None:
        """ValueError if members overlap, as in zip bombs, or exceed the file."""
        end, before = 0, ""
        read = [(name, member) for name, member in self._members.items() if not left_out(name)]
        for name, member in sorted(read, key=lambda item: item[1].offset):
            if member.offset < end:
                raise ValueError(
                    f"{name!r} and {before!r} overlap in {self._called}, as happens only in damaged or hostile zips; "
                    "download it again from its publisher"
                )
            end, before = member.offset + _HEADER_BYTES + member.coded_bytes, name
        if end > self._path.stat().st_size:
            raise ValueError(f"{self._called} ends in the middle of {before!r}; download it again")


def _damaged() -> OSError:
    return OSError(errno.EIO, "damaged in its zip")


def _plain_name(info: zipfile.ZipInfo, called: str) -> str:
    """The member's path, separated by '/'. ValueError if it leads outside the archive."""
    name = info.orig_filename
    if not name.isascii() and not info.flag_bits & _NAME_IS_UTF8:
        name = _as_utf8(name, called)
    name = name.replace("\\", "/")
    if any(unicodedata.category(c) == "Cc" for c in name) and not left_out(name):  # macOS names a file Icon\r
        raise ValueError(
            f"{called} contains {name!r}, a name with control characters, as happens only in damaged or hostile zips; "
            "download it again from its publisher, or unpack it and use the folder as source"
        )
    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
        raise ValueError(
            f"{called} contains {name!r}, which leads outside it; names in an archive must be relative and must not "
            "have '..': download it again from its publisher, or pack it again"
        )
    return str(PurePosixPath(name))


def _as_utf8(name: str, called: str) -> str:
    # Without the flag a name is code page 437, but most programs that omit the flag write UTF-8.
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(
            f"{called} contains a name that is neither ASCII nor UTF-8 ({name!r} if read as code page 437); unpack it "
            "with its own encoding (unzip -O) and use the folder as source"
        ) from error


def _checked(info: zipfile.ZipInfo, name: str, called: str) -> _Member:
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(
            f"{name!r} in {called} is encrypted; unpack the archive with its password and use the folder as source"
        )
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = zipfile.compressor_names.get(info.compress_type, str(info.compress_type))  # type: ignore[attr-defined]
        raise ValueError(
            f"{name!r} in {called} is packed with {method}, but only stored and deflated members can be read; unpack "
            "the archive and use the folder as source"
        )
    coded, size = info.compress_size, info.file_size
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    if (not deflated and coded != size) or (size > _NEVER_A_BOMB_BYTES and size > _MOST_SHRUNK * coded):
        raise ValueError(
            f"{name!r} in {called} claims to unpack from {coded:,} to {size:,} bytes, as happens only in damaged or "
            "hostile zips; download it again from its publisher, or, if you trust it, unpack it and use the folder as "
            "source"
        )
    raw_name = info.orig_filename.encode("utf-8" if info.flag_bits & _NAME_IS_UTF8 else "cp437")
    return _Member(raw_name, info.header_offset, coded, size, info.CRC, deflated)
