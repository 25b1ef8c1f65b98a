"""Temporary folders that a killed process does not leave for ever: the next one to need any removes them."""

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
_NEW = ".medmamba-new-"  # until it is locked: the next process must not take it for one left behind


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """A folder below TMPDIR for the length of the block, named `medmamba.<purpose>.<random>`.

    A lock on it, which the kernel lifts when this process ends however it ends, says that it is in use.
    Raises DiskFullError where its disk was filled in the block.
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
    except Exception as error:
        # Asked before the folder is removed: afterwards there is room again.
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
        with contextlib.suppress(OSError):  # in use (BlockingIOError), removed meanwhile, or not a folder of ours
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
    except OSError:  # a file system without locks: nobody else can lock it either, so nobody removes it
        lock = os.open(new, os.O_RDONLY)
    folder = new.with_name(f"{PREFIX}{purpose}.{new.name.removeprefix(_NEW)}")
    new.rename(folder)
    return folder, lock


def _lock(folder: Path) -> int:
    """An open file that holds the folder's lock; BlockingIOError where another process holds it."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _no_room(folder: Path, purpose: str) -> str:
    """The line about a full TMPDIR; what the scratch folder holds is the least that was needed."""
    ours, needed = folder.name.startswith(PREFIX), ""
    if ours:
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        needed = f"more than {size_text(written)} needed"
    line = full_disk(folder.parent if ours else folder, f"temporary files ({purpose})", needed)
    return f"{line}, or set TMPDIR to a folder on another disk"
