"""Files that operating systems and editors leave among images; they are left out of a set and counted."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

# Lower case. From Windows, macOS, Synology and QNAP, Linux, Python.
_NAMES = {
    "thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler",
    "system volume information", "__macosx", "network trash folder", "temporary items", "@eadir", "#recycle",
    "@recycle", "lost+found", "__pycache__",
}  # fmt: skip
# macOS ends the name with a carriage return, which archives and file servers encode differently. Only for files: a
# folder may be a class of icons.
_ICON = {f"icon{end}" for end in ("", "\r", "_", "?", "\uf00d", "#015", "%0d")}
# Endings that programs append to backup copies and incomplete files.
_ENDING = re.compile(
    r"\.(?:(?:bak|backup|old|orig|tmp|temp|swp|swo)\d*|part|partial|filepart|crdownload|opdownload|aria2|!ut|!qb"
    r"|aux\.xml|rej|lock)$"
)
_MOST_NAMED = 3


def left_out(path: str, *, folder: bool = False) -> str:
    """The path up to the file or folder that does not belong to the set; "" if all of it belongs."""
    parts = PurePosixPath(path).parts
    for i, name in enumerate(parts):
        lower = name.lower()
        is_file = i == len(parts) - 1 and not folder
        if (
            name.startswith((".", "~$"))
            or lower in _NAMES
            or lower.endswith(".download")  # a folder made by Safari
            or (is_file and (lower in _ICON or lower.endswith(("zone.identifier", "~")) or _is_autosave(lower)))
            or (is_file and _ENDING.search(lower))
        ):
            return "/".join(parts[: i + 1])
    return ""


def _is_autosave(name: str) -> bool:
    return len(name) > 2 and name[0] == name[-1] == "#"


def without_litter(paths: Iterable[str], *, folders: bool = False) -> tuple[list[str], set[str]]:
    """The paths that belong to the set, sorted, and the files or folders that exclude the others."""
    kept, found = [], set()
    for path in paths:
        if outside := left_out(path, folder=folders):
            found.add(outside)
        else:
            kept.append(path)
    return sorted(kept), found


def note_of(found: Collection[str]) -> tuple[str, ...]:
    """A note about the files and folders that are left out."""
    names = {PurePosixPath(path).name for path in found}
    return named_note("hidden or left by other programs, so left out", names, len(found))


def named_note(what: str, names: Collection[str], num: int | None = None) -> tuple[str, ...]:
    """A note with the count and the first few names; empty without names."""
    if not names:
        return ()
    listed = [repr(name)[1:-1] for name in sorted(names)]  # control characters would break the line
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return (f"{len(names) if num is None else num} {what}: {', '.join(listed[:_MOST_NAMED])}{more}",)
