"""Detects full disks and describes them in one line: path, free space, required space."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# Messages of libraries that hide the error number: pyarrow, torch's writer, SQLite, compilers.
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
    """A disk is full; the message has its path, the free space and the required space."""

    @property
    def public(self) -> str:
        """The message, which has no names of images."""
        return str(self)


def says_full(error: BaseException) -> bool:
    """Whether the error means that a disk or quota is full."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    text = str(error).lower()
    return any(sign in text for sign in SIGNS)


def is_full(path: str | Path) -> bool:
    """Whether the disk of `path` has less than 1 MiB or no inodes left."""
    try:
        state = os.statvfs(_existing(path))
    except OSError:
        return False
    return state.f_bavail * state.f_frsize < _LITTLE_BYTES or (state.f_files > 0 and state.f_favail == 0)


def temporary_folder() -> str:
    """The folder for temporary files; also if it is full, where `tempfile.gettempdir` raises."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return os.environ.get("TMPDIR") or "/tmp"


def require_temporary_folder() -> None:
    """DiskFullError if no folder for temporary files has room: libraries would fail."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        folder = temporary_folder()
        raise DiskFullError(
            f"{full_disk(folder, 'temporary files')}, or set TMPDIR to a folder on another disk"
        ) from None


def full_disk(path: str | Path, what: str, needed: str = "") -> str:
    """Message that `what` could not be written to the full disk of `path`; `needed` is the required space, if known."""
    there = _existing(path)
    free = size_text(shutil.disk_usage(there).free)
    wanted = f", {needed}" if needed else ""
    if not is_full(there):
        # The incomplete file has been removed, or the limit is a quota.
        return f"the disk of {path} had no room for {what} ({free} free now{wanted}); free some space there"
    return f"the disk of {path} is full: no room for {what} ({free} free{wanted}); free some space there"


def size_text(size_bytes: int) -> str:
    """A number of bytes as text: 512 B, 3.4 MiB, 12 GiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _existing(path: str | Path) -> Path:
    """The path, or its nearest existing parent."""
    there = Path(path).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return there
