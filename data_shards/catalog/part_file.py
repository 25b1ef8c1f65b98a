"""An incomplete download: its bytes in `<name>.part`, and in `<name>.part.json` what the server called them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class FetchError(ValueError):
    """The file cannot be downloaded, or is not the published one: says which, why, and what to do."""


class PartFile:
    """The downloaded bytes, and `notes` (url, validator, total) about the file they belong to."""

    def __init__(self, target: Path, url: str, data: Any):
        self._target, self._data = target, data
        self.path, self._notes_path = _sibling(target, ".part"), _sibling(target, ".part.json")
        self.notes: dict[str, Any] = {}
        # Without notes, or with damaged ones or those of another address, the origin of a part is unknown.
        with contextlib.suppress(OSError, ValueError):
            notes = json.loads(self._notes_path.read_text())
            self.notes = notes if isinstance(notes, dict) and notes.get("url") == url else {}

    @property
    def size(self) -> int:
        """Downloaded bytes."""
        return os.fstat(self._data.fileno()).st_size

    def begin(self, notes: dict[str, Any]) -> None:
        """Deletes all bytes, and notes what the next ones are."""
        self._data.truncate(0)
        self.notes = notes
        temporary = _sibling(self._target, ".part.json.tmp")
        temporary.write_text(json.dumps(notes))
        os.replace(temporary, self._notes_path)

    def write(self, data: bytes) -> None:
        """Appends."""
        left = memoryview(data)
        try:
            while left:  # an unbuffered file takes as much as fits
                left = left[self._data.write(left) :]
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise FetchError(
                f"{self.path} cannot be written after {self.size:,} bytes: {error.strerror}; "
                f"{'free some space' if full else 'fix that'} and give the same command to resume"
            ) from error

    def finish(self) -> None:
        """Puts the file in place, on the disk and not only in its cache."""
        os.fsync(self._data.fileno())
        os.replace(self.path, self._target)
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._notes_path.unlink(missing_ok=True)

    def quarantine(self) -> Path:
        """Renames the part to `<name>.wrong`, or `.wrong-2` and so on, and returns its path."""
        number = 1
        while (wrong := _sibling(self._target, f".wrong{f'-{number}' * (number > 1)}")).exists():
            number += 1
        os.replace(self.path, wrong)
        self._notes_path.unlink(missing_ok=True)
        return wrong


@contextlib.contextmanager
def opened_part(target: Path, url: str) -> Iterator[PartFile | None]:
    """The part of a file, for this process alone; None if another process has just finished the file."""
    path = _sibling(target, ".part")
    with path.open("ab", buffering=0) as data:
        try:
            fcntl.flock(data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FetchError(
                f"{target} is being fetched by another process, which holds {path}: wait for it, or end it"
            ) from None
        if not _still_named(data, path) and not target.exists():
            raise FetchError(f"{target} was being fetched by another process until now: give the same command again")
        if target.exists():
            with contextlib.suppress(OSError):  # a new, empty part; the finished one has lost its name
                if path.stat().st_size == 0:
                    path.unlink()
            yield None
        else:
            yield PartFile(target, url, data)


def _still_named(data: Any, path: Path) -> bool:
    """Whether the open file is still the one of that name: the process that held the lock may have renamed it."""
    try:
        return os.path.samestat(os.fstat(data.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sibling(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)
