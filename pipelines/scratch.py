"""Temporary folders; the next process that needs one removes those of killed processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data_shards.store.disk import DiskFullError, full_disk, is_full, size_text

PREFIX = "medmamba."
_NEW = ".medmamba-new-"  # until it is locked, so that no other process takes it for a leftover


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """Yields a folder in TMPDIR, `medmamba.<purpose>.<random>`, and removes it after the block.

    A lock marks it as in use; the kernel releases the lock however this process ends.
    Raises DiskFullError if its disk fills up inside the block.
    """
    remove_left_behind()
    root = tempfile.gettempdir()
    try:
        folder, lock = _locked_folder(purpose)
    except OSError as error:
        if is_full(root):
            raise DiskFullError(_no_room(Path(root), purpose)) from error
        raise
    try:
        yield folder
    except Exception as error:  # libraries report a full disk in many ways
        # Checked before the folder is removed, which frees space.
        if is_full(folder) and not isinstance(error, DiskFullError):
            raise DiskFullError(_no_room(folder, purpose)) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_left_behind() -> list[Path]:
    """Removes the scratch folders of this user whose process has ended; returns them."""
    gone = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use (BlockingIOError), already removed, or not ours
            lock = _lock(folder)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(folder)
                    gone.append(folder)
            finally:
                os.close(lock)
    return gone


def _locked_folder(purpose: str) -> tuple[Path, int]:
    new = Path(tempfile.mkdtemp(prefix=_NEW))
    try:
        lock = _lock(new)
    except OSError:  # no locks on this file system, so no other process can lock and remove it
        lock = os.open(new, os.O_RDONLY)
    folder = new.with_name(f"{PREFIX}{purpose}.{new.name.removeprefix(_NEW)}")
    new.rename(folder)
    return folder, lock


def _lock(folder: Path) -> int:
    """Returns a file descriptor that holds the folder's lock; BlockingIOError if another process holds it."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _no_room(folder: Path, purpose: str) -> str:
    """The message about a full TMPDIR; the size of the scratch folder is a lower bound of what was needed."""
    ours, needed = folder.name.startswith(PREFIX), ""
    if ours:
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        needed = f"more than {size_text(written)} needed"
    line = full_disk(folder.parent if ours else folder, f"temporary files ({purpose})", needed)
    return f"{line}, or set TMPDIR to a folder on another disk"
