"""The image column of a table: what is written there -> the files of the set.

A path is looked for, in this order: relative to the table, relative to the source or a folder above the table, as an
absolute path below the source, as the end of a file's path (bare names in subfolders, without their ending), and, for
the table as a whole, without the folders in front that all of its paths share (the data set's own, those of another
machine). What could be two files is an error; no rule takes a file whose known folders contradict the path.
"""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_shards.split import SPLIT_WORDS
from data_shards.table import ENDINGS, Table


@dataclass(frozen=True)
class Places:
    """The file of each row, "" where there is none; what the owner should know; where was looked, for messages."""

    files: list[str]
    notes: tuple[str, ...]
    looked: str


def find_images(values: Sequence[str], table: Table, names: Sequence[str], source: str) -> Places:
    """The file that each path of a table means, among the `names` of the source's files.

    Raises ValueError where a path may be several files, and where two rows have the same file.
    """
    finder = _Finder([name for name in names if name != table.path], table, source)
    files = finder.relative(values)
    finder.by_tail(values, files)
    notes = finder.without_front(values, files)
    lines: dict[str, int] = {}
    for i, file in enumerate(files):
        if file and lines.setdefault(file, i) != i:
            raise ValueError(
                f"image {values[i]!r} is in {table.line(lines[file])} and again in {table.line(i)}: an image may be "
                "in one row only, so keep one of them"
            )
    beside = f"the folder of the table ({table.folder}), " if table.folder else ""
    return Places(files, notes, f"relative to {beside}{source}, and as the end of a path there")


@dataclass(frozen=True)
class _Tail:
    """A file at the end of a path: what is in front, how many parts agree, and the folder that the table lacks."""

    front: str
    file: str
    num_parts: int
    wrapper: str


class _Finder:
    """Looks for the files of a table's paths, row by row and then for the table as a whole."""

    def __init__(self, names: Sequence[str], table: Table, source: str):
        self._names, self._known, self._table = names, set(names), table
        self._folder, self._table_stem = table.folder, PurePosixPath(table.path).stem
        self._above = [table.folder, *_parents(table.folder)]
        self._roots = _roots(source)
        images = [name for name in names if not name.lower().endswith(ENDINGS)]
        common = posixpath.commonpath([posixpath.dirname(name) for name in images]) if images else ""
        # A folder that holds all images says nothing; below it the table's folders must be there.
        self._wrapper = common.split("/")[0] if common and not self._folder else ""
        self._source_name = PurePosixPath(source.rstrip("/")).name
        self._tails: dict[tuple[int, bool, bool], dict[str, list[str]]] = {}
        self._paths: dict[tuple[bool, bool], dict[str, list[str]]] = {}

    # --- one row at a time

    def relative(self, values: Sequence[str]) -> list[str]:
        """The files at the paths as they are written, relative to the table or the source."""
        return [self._exact(value, i) for i, value in enumerate(values)]

    def _exact(self, value: str, i: int) -> str:
        for path in _readings(value):
            at_table = posixpath.normpath(posixpath.join(self._folder, path.lstrip("/")))
            if at_table in self._known:
                return at_table
            below = self._below_source(path)
            if below is not None:
                return below if below in self._known else ""
            above = {posixpath.normpath(posixpath.join(folder, path.lstrip("/"))) for folder in self._above}
            if "/" in path.strip("/") and (file := self._one(above & self._known, value, i)):
                return file
        return ""

    def _below_source(self, path: str) -> str | None:
        """An absolute path relative to the source; None where it is not below it."""
        for root in self._roots:
            if path.startswith(f"{root}/"):
                return posixpath.normpath(path[len(root) + 1 :])
        return None

    def by_tail(self, values: Sequence[str], files: list[str]) -> None:
        """Fills in the files whose paths end in what is written: first as it is, then without ending, then loosely.

        Where rows were found beside the table, a bare name does not mean a file elsewhere; nor does a table of one
        split mean files of another.
        """
        bare = [i for i, value in enumerate(values) if not files[i] and "/" not in _plain(value)]
        beside = bool(self._folder) and any(file.startswith(f"{self._folder}/") for file in files)
        for i, value in enumerate(values):
            if files[i] or any(self._below_source(path) is not None for path in _readings(value)):
                continue
            for path in _readings(value):
                candidates = self._ending_in(path)
                if beside and "/" not in path:
                    candidates = {file for file in candidates if file.startswith(f"{self._folder}/")}
                if file := self._one(candidates, value, i):
                    files[i] = file
                    break
        own_split = _splits_in(self._folder) or _splits_in(" ".join(re.split(r"[\W_]+", self._table_stem)), " ")
        certain = bool(_splits_in(self._folder)) or any(own_split & _splits_in(files[i]) for i in bare)
        for i in bare:
            others = _splits_in(posixpath.dirname(files[i]))
            if len(own_split) == 1 and certain and others and not others & own_split:
                files[i] = ""

    def _ending_in(self, path: str) -> set[str]:
        path = path.removeprefix("/")
        parts = path.split("/")
        if not path or ".." in parts:
            return set()
        for fold in (False, True):
            for stem in (False, True):
                if found := self._index(len(parts), fold=fold, stem=stem).get(_loose(path) if fold else path):
                    return set(found)
        return set()

    def _index(self, length: int, *, fold: bool, stem: bool) -> dict[str, list[str]]:
        """The files by the last `length` parts of their paths, without ending if `stem`."""
        key = (length, fold, stem)
        if key not in self._tails:
            index: dict[str, list[str]] = defaultdict(list)
            for name in self._names:
                parts = name.rsplit("/", length)[-length:]
                if len(parts) == length:
                    tail = "/".join(parts)
                    tail = posixpath.splitext(tail)[0] if stem else tail
                    index[_loose(tail) if fold else tail].append(name)
            self._tails[key] = dict(index)
        return self._tails[key]

    def _one(self, candidates: Iterable[str], value: str, i: int) -> str:
        files = sorted(candidates)
        if len(files) > 1:
            raise ValueError(
                f"image {value!r} in {self._table.line(i)} may be any of {', '.join(files[:3])}: write its path "
                "relative to the table, or remove the others"
            )
        return files[0] if files else ""

    # --- the table as a whole

    def without_front(self, values: Sequence[str], files: list[str]) -> tuple[str, ...]:
        """Fills in the files at the paths without the folders in front that all of them share; notices.

        Not where another path with a folder was found as it is written: then the paths are known to be relative.
        Absolute paths, of another machine, say nothing about relative ones.
        """
        notes: list[str] = []
        for absolute in (True, False):
            rows = [i for i, value in enumerate(values) if _plain(value).startswith("/") == absolute]
            if not any(files[i] and "/" in _plain(values[i]) for i in rows):
                notes += self._without_front([i for i in rows if not files[i]], values, files)
        return tuple(notes)

    def _without_front(self, rows: Sequence[int], values: Sequence[str], files: list[str]) -> Iterator[str]:
        found = {i: match for i in rows if (match := self._longest_tail(values[i], i))}
        alike = {posixpath.dirname(_plain(values[i])) for i in rows}
        for front in {match.front for match in found.values()}:
            examples = {i: match for i, match in found.items() if match.front == front}
            everywhere = all(_plain(values[i]).startswith(f"{front}/") for i in rows)
            if not self._trusted(list(examples.values()), same_folder=len(alike) == 1, everywhere=everywhere):
                found = {i: match for i, match in found.items() if i not in examples}
        fronts = {match.front: (i, match) for i, match in reversed(found.items())}
        if len({PurePosixPath(front).name for front in fronts}) > 1:
            told = "; ".join(
                f"{front!r} in front of {match.file!r} ({self._table.line(i)})"
                for front, (i, match) in sorted(fronts.items())[:3]
            )
            raise ValueError(
                f"paths of {self._table.path} are found only without their first folders, which differ: {told}; write "
                "them relative to the table"
            )
        for i, match in found.items():
            files[i] = match.file
        for front, (_, match) in sorted(fronts.items()):
            count = sum(each.front == front for each in found.values())
            below = f", as files below {match.wrapper!r}" if match.wrapper else ""
            yield f"{count:,} paths of {self._table.path} are read without {front!r} in front{below}"

    def _longest_tail(self, value: str, i: int) -> _Tail | None:
        """The longest end of `value` that is a file's path from a folder of the table or source, or in a wrapper."""
        if any(self._below_source(path) is not None for path in _readings(value)):
            return None
        for path in _readings(value):
            absolute, parts = path.startswith("/"), path.strip("/").split("/")
            for wrapper in dict.fromkeys(("", self._wrapper)):
                for start in range(1, len(parts)):
                    tail = "/".join(parts[start:])
                    if file := self._one(self._at(posixpath.join(wrapper, tail)), value, i):
                        front = "/" * absolute + "/".join(parts[:start])
                        return _Tail(front, file, len(parts) - start, wrapper)
        return None

    def _trusted(self, matches: Sequence[_Tail], *, same_folder: bool, everywhere: bool) -> bool:
        """Whether files may be taken that lack the folders in front which the table has.

        A split in front (`train/1.png`) must be that of the folder where the file is. A file name alone decides only
        where all paths of the table have the same folders, so that these say nothing. A folder around all files that
        the table does not know (`wrapper`) may stand for the one in front if all paths have that.
        """
        front, wrapper = matches[0].front, matches[0].wrapper
        last = PurePosixPath(front).name.casefold()
        homes = {PurePosixPath(self._folder).name.casefold(), self._source_name.casefold()}
        fewest = min(match.num_parts for match in matches)
        if wrapper:
            return everywhere and fewest > 1 and not _splits_in(front) | _splits_in(wrapper)
        if last in SPLIT_WORDS:
            return last in homes
        return fewest > 1 or last in homes or same_folder

    def _at(self, path: str) -> set[str]:
        """The files at a path relative to the table, the source or a folder between them."""
        for fold in (False, True):
            for stem in (False, True):
                if (fold, stem) not in self._paths:
                    paths: dict[str, list[str]] = defaultdict(list)
                    for name in self._names:
                        each = posixpath.splitext(name)[0] if stem else name
                        paths[_loose(each) if fold else each].append(name)
                    self._paths[fold, stem] = dict(paths)
                wanted = [posixpath.join(folder, path) for folder in self._above]
                found = [self._paths[fold, stem].get(_loose(each) if fold else each, []) for each in wanted]
                if any(found):
                    return {name for names in found for name in names}
        return set()


def _roots(source: str) -> list[str]:
    """What an absolute path below the source may begin with."""
    if "://" in source:
        return [_plain(source.rstrip("/"))]
    expanded = os.path.expanduser(source)
    return list(dict.fromkeys((os.path.abspath(expanded), os.path.realpath(expanded))))


def _parents(folder: str) -> list[str]:
    return ["" if str(parent) == "." else str(parent) for parent in PurePosixPath(folder).parents] if folder else []


def _readings(value: str) -> list[str]:
    """The path as it is written, with "/" between its parts, and with the escapes of an URL resolved."""
    plain = _plain(value)
    unescaped = _plain(urllib.parse.unquote(value)) if "%" in value else plain
    return list(dict.fromkeys((plain, unescaped)))


def _plain(value: str) -> str:
    """The path with "/" between its parts, absolute ones from "/" on: without a drive or the scheme of an URL."""
    path = value.replace("\\", "/")
    path = re.sub(r"^(file:/*|[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z]:/)", "/", path)
    path = posixpath.normpath(path) if path else ""
    return "/" + path.lstrip("/") if path.startswith("//") else path


def _splits_in(path: str, separator: str = "/") -> set[str]:
    """The splits that parts of a path are named after."""
    return {SPLIT_WORDS[part] for part in path.casefold().split(separator) if part in SPLIT_WORDS}


def _loose(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
