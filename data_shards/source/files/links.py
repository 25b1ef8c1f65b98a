"""Resolves links inside an archive like a file system: relative to their folder, through other links, never outside.

A link to a file is that file under another name; a link to a folder has its contents. A broken link is a file that
cannot be read, so that it is counted.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from data_shards.source.files.litter import named_note

NOWHERE = "a link to a file that is not there"
OUTSIDE = "a link that leads out of the archive"
ENDLESS = "a link that leads back to itself"
ENDLESS_NOTE = "links lead to a folder that they are in and are not followed"
# As many as Linux follows for one path.
_MOST_LINKS = 40
# Folders that link to each other can have an exponential number of paths.
MOST_LINKED = 10_000


class Linked(NamedTuple):
    """Files and folders that the links of an archive add."""

    files: dict[str, str]
    """Link name -> target file."""
    folders: list[str]
    broken: dict[str, str]
    """Link name -> why it is broken."""
    endless: list[str]
    """Links to a folder that contains them; they are not followed."""


class _BrokenLinkError(Exception):
    """The first argument is the reason."""


def follow(files: Iterable[str], folders: Iterable[str], links: Mapping[str, str], called: str) -> Linked:
    """Resolves links (name -> target as written). ValueError if they lead to more than MOST_LINKED folders."""
    found = Linked({}, [], {}, [])
    if not links:
        return found
    below = _children(files, [*folders, *links])
    # Name, path of its link or file, and the resolved folders above it.
    todo: list[tuple[str, str, frozenset[str] | None]] = [(name, name, None) for name in sorted(links, reverse=True)]
    nested = 0
    while todo:
        name, place, above = todo.pop()
        nested += above is not None and place in links
        try:
            above = frozenset(_resolved(each, links) for each in _parents(name)) if above is None else above
            target = _resolved(place, links)
            if target not in below:
                raise _BrokenLinkError(NOWHERE)
        except _BrokenLinkError as error:
            found.broken[name] = str(error)
            continue
        children = below[target]
        if children is None:
            found.files[name] = target
        elif target in above:
            found.endless.append(name)
        else:
            found.folders.append(name)
            todo += [(f"{name}/{child}", posixpath.join(target, child), above | {target}) for child in children]
        if nested > MOST_LINKED:
            raise ValueError(
                f"the links of {called} lead through each other to more than {MOST_LINKED:,} folders; remove "
                "unnecessary links, or replace them with copies of their targets"
            )
    return found


def broken_links(broken: Mapping[str, str]) -> tuple[str, ...]:
    """A note that counts and names the broken links with their reasons; empty without broken links."""
    named = [f"{name} ({why})" for name, why in broken.items()]
    return named_note("broken link is not read" if len(named) == 1 else "broken links are not read", named)


def _children(files: Iterable[str], others: Iterable[str]) -> dict[str, set[str] | None]:
    """The names directly in each folder; None for a file."""
    below: dict[str, set[str] | None] = {"": set()}
    for name in files:
        below[name] = None
    for name in [*below, *others]:
        below.setdefault(name, set())
        while name:
            parent = posixpath.dirname(name)
            known = below.setdefault(parent, set())
            if known is not None:
                known.add(posixpath.basename(name))
            name = parent
    return below


def _resolved(path: str, links: Mapping[str, str]) -> str:
    """The path with all links resolved, "" for the archive itself."""
    todo = path.split("/")[::-1] if path else []
    place: list[str] = []
    followed = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not place:
                raise _BrokenLinkError(OUTSIDE)
            place.pop()
            continue
        here = "/".join([*place, part])
        if here not in links:
            place.append(part)
            continue
        followed += 1
        if followed > _MOST_LINKS:
            raise _BrokenLinkError(ENDLESS)
        if links[here].startswith("/"):
            raise _BrokenLinkError(OUTSIDE)
        todo += links[here].split("/")[::-1]
    return "/".join(place)


def _parents(path: str) -> list[str]:
    """The parent folders of a path, including the archive itself ("")."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(len(parts))]
