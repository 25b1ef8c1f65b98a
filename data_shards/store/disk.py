"""A full disk told in one line: which path, how much is free, how much was needed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries that hide the number of the error say of it: pyarrow, torch's writer, SQLite, compilers.
SIGNS = (
    "no space left on device",
    "disk quota exceeded",
    "database or disk is full",
    "inline_container.cc",
    "pytorchstreamwriter failed writing",
    "errno 28]",
    "local disk is full",
)
_LITTLE_BYTES = 1 << 20


class DiskFullError(ValueError):
    """A disk has no room for what had to be written to it: says which, how much is free and how much it takes."""

    @property
    def public(self) -> str:
        """The text: it names folders of this machine and of the store, and no image."""
        return str(self)


def says_full(error: BaseException) -> bool:
    """Whether the error itself says that a disk, or a user's share of it, is full."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    text = str(error).lower()
    return any(sign in text for sign in SIGNS)


def is_full(path: str | Path) -> bool:
    """Whether the disk of `path` has less than 1 MiB, or no file, left."""
    try:
        state = os.statvfs(_existing(path))
    except OSError:
        return False
    return state.f_bavail * state.f_frsize < _LITTLE_BYTES or (state.f_files > 0 and state.f_favail == 0)


def temporary_folder() -> str:
    """Where temporary files go. Python gives none where no place for them has room, of which this returns the first."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return os.environ.get("TMPDIR") or "/tmp"


def require_temporary_folder() -> None:
    """DiskFullError where no place for temporary files has room: no library can work then."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        folder = temporary_folder()
        raise DiskFullError(
            f"{full_disk(folder, 'temporary files')}, or set TMPDIR to a folder on another disk"
        ) from None


def full_disk(path: str | Path, what: str, needed: str = "") -> str:
    """The line about a full disk: `what` could not be written to `path`; `needed`, where known, how much it takes."""
    there = _existing(path)
    free = size_text(shutil.disk_usage(there).free)
    wanted = f", {needed}" if needed else ""
    if not is_full(there):
        # What did not fit has been removed again, or the limit is a quota's.
        return f"the disk of {path} had no room for {what} ({free} free now{wanted}); free space there"
    return f"the disk of {path} is full: no room for {what} ({free} free{wanted}); free space there"


def size_text(size_bytes: int) -> str:
    """A number of bytes as one reads it: 512 B, 3.4 MiB, 12 GiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _existing(path: str | Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    there = Path(path).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return there
