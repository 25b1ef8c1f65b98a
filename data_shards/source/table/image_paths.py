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

from data_shards.source.table.text_table import ENDINGS, Table
from data_shards.split import SPLIT_WORDS

_SCHEME = re.compile(r"^(file:/*|[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z]:/)")
# What a path may have that normalizing it would change.
_UNTIDY = re.compile(r"[\\:]|//|^\./|^\.\./|/\.\.?(/|$)|./$")


@dataclass(frozen=True)
class Places:
    """The file of each row, "" where there is none; notes for the owner; the places searched, for messages."""

    files: list[str]
    notes: tuple[str, ...]
    looked: str


def find_images(values: Sequence[str], table: Table, names: Sequence[str], source: str) -> Places:
    """The file that each path of a table means, among the `names` of the source's files.

    Raises ValueError where a path may be several files, and where two rows have the same file.
    """
    finder = _Finder(values, table, [name for name in names if name != table.path], source)
    finder.find_as_written()
    finder.find_by_end()
    notes = finder.find_without_front()
    lines: dict[str, int] = {}
    for i, file in enumerate(finder.files):
        if file and lines.setdefault(file, i) != i:
            raise ValueError(
                f"image {values[i]!r} is in {table.line(lines[file])} and again in {table.line(i)}: an image may be "
                "in one row only, so keep one of them"
            )
    folder = f"the folder of the table ({table.folder}), " if table.folder else ""
    return Places(finder.files, notes, f"relative to {folder}{source}, and as the end of a path there")


@dataclass(frozen=True, slots=True)
class _Tail:
    """A file at the end of a path: what is in front, how many parts agree, and the folder that the table lacks."""

    front: str
    file: str
    num_parts: int
    wrapper: str


class _Finder:
    """Looks for the files of a table's paths: by three rules, each for the rows that the ones before did not find."""

    def __init__(self, values: Sequence[str], table: Table, names: Sequence[str], source: str):
        self._values, self._table, self._names, self._known = values, table, names, set(names)
        self._readings = [_readings(value) for value in values]
        self._folder, self._table_stem = table.folder, PurePosixPath(table.path).stem
        self._above = [table.folder, *_parents(table.folder)]
        self._roots = _roots(source)
        self._source_name = PurePosixPath(source.rstrip("/")).name
        images = [name for name in names if not name.lower().endswith(ENDINGS)]
        common = posixpath.commonpath([posixpath.dirname(name) for name in images]) if images else ""
        # A folder that holds all images carries no information; below it the table's folders must exist.
        self._wrapper = common.split("/")[0] if not self._folder else ""
        self._ends: dict[tuple[int, bool, bool], dict[str, list[str]]] = {}
        self.files = [""] * len(values)
        self._below = {i for i, paths in enumerate(self._readings) if any(map(self._below_source, paths))}

    # --- as it is written

    def find_as_written(self) -> None:
        """Paths relative to the table, to the source or a folder between them, or absolute below the source."""
        self.files = [self._as_written(i) for i in range(len(self._values))]

    def _as_written(self, i: int) -> str:
        for path in self._readings[i]:
            for absolute in (path, self._below_source(path)):
                if absolute and (file := self._relative(absolute.lstrip("/"), i)):
                    return file
        return ""

    def _relative(self, path: str, i: int) -> str:
        at_table = posixpath.normpath(f"{self._folder}/{path}") if self._folder else path
        if at_table in self._known:
            return at_table
        # A bare name may be anywhere: that is the next rule's.
        above = {posixpath.normpath(posixpath.join(folder, path)) for folder in self._above[1:]} if "/" in path else ()
        return self._one({file for file in above if file in self._known}, i)

    def _below_source(self, path: str) -> str:
        """An absolute path relative to the source; "" where it is not below it."""
        root = next((root for root in self._roots if path.startswith(root)), "")
        return path[len(root) :] if root else ""

    def _one(self, candidates: Iterable[str], i: int) -> str:
        files = sorted(candidates)
        if len(files) > 1:
            raise ValueError(
                f"image {self._values[i]!r} in {self._table.line(i)} may be any of {', '.join(files[:3])}: write its "
                "path relative to the table, or remove the others"
            )
        return files[0] if files else ""

    # --- as the end of a file's path

    def find_by_end(self) -> None:
        """Files whose paths end in what is written: first as it is, then without ending, then loosely.

        If rows were found next to the table, a bare name does not mean a file elsewhere; nor does a table of one
        split mean files of another.
        """
        rows = [i for i, file in enumerate(self.files) if not file and i not in self._below]
        folder = f"{self._folder}/" if any(file.startswith(f"{self._folder}/") for file in self.files) else ""
        for i in rows:
            for path in self._readings[i]:
                candidates = self._ending_in(path)
                if folder and "/" not in path:
                    candidates = [file for file in candidates if file.startswith(folder)]
                if file := self._one(candidates, i):
                    self.files[i] = file
                    break
        self._leave_other_splits([i for i in rows if "/" not in self._readings[i][0]])

    def _leave_other_splits(self, bare: Sequence[int]) -> None:
        by_folder = _splits_in(self._folder)
        own = by_folder or _splits_in("/".join(re.split(r"[\W_]+", self._table_stem)))
        homes = {i: _splits_in(posixpath.dirname(self.files[i])) for i in bare if self.files[i]} if own else {}
        if len(own) == 1 and (by_folder or any(own & home for home in homes.values())):
            for i, home in homes.items():
                if home and not home & own:
                    self.files[i] = ""

    def _ending_in(self, path: str) -> Sequence[str]:
        path = path.removeprefix("/")
        if not path or path.startswith(".."):
            return ()
        for fold in (False, True):
            for stem in (False, True):
                index = self._index(path.count("/") + 1, fold=fold, stem=stem)
                if index and (found := index.get(_loose(path) if fold else path)):
                    return found
        return ()

    def _index(self, length: int, *, fold: bool, stem: bool) -> dict[str, list[str]]:
        """The files by the last `length` parts of their paths, all of them if 0; without ending if `stem`."""
        key = (length, fold, stem)
        if key not in self._ends:
            index: dict[str, list[str]] = defaultdict(list)
            for name in self._names:
                end = "/".join(name.rsplit("/", length)[-length:]) if length else name
                if length and end.count("/") + 1 < length:
                    continue
                end = posixpath.splitext(end)[0] if stem else end
                index[_loose(end) if fold else end].append(name)
            self._ends[key] = dict(index)
        return self._ends[key]

    # --- without what is in front

    def find_without_front(self) -> tuple[str, ...]:
        """Files at the paths without the folders in front that all of them share; notices.

        Not where another path with a folder was found as it is written: then the paths are known to be relative.
        Absolute paths, of another machine, say nothing about relative ones.
        """
        notes: list[str] = []
        for absolute in (True, False):
            rows = [i for i, paths in enumerate(self._readings) if paths[0].startswith("/") == absolute]
            if not any(self.files[i] and "/" in self._readings[i][0] for i in rows):
                notes += self._without_front([i for i in rows if not self.files[i] and i not in self._below])
        return tuple(notes)

    def _without_front(self, rows: Sequence[int]) -> Iterator[str]:
        found: dict[int, _Tail] = {}
        for fold in (False, True):
            # Looking loosely is slow: where other rows are found already, only for what is in front of those.
            fronts = {match.front for match in found.values()}
            rest = [i for i in rows if i not in found]
            found |= {i: match for i in rest if (match := self._longest_end(i, fold=fold, fronts=fronts))}
        found = self._trusted(found, rows)
        examples = {match.front: (i, match) for i, match in reversed(found.items())}
        if len({PurePosixPath(front).name for front in examples}) > 1:
            shown = "; ".join(
                f"{front!r} in front of {match.file!r} ({self._table.line(i)})"
                for front, (i, match) in sorted(examples.items())[:3]
            )
            raise ValueError(
                f"paths of {self._table.path} are found only without their first folders, which differ: {shown}; write "
                "them relative to the table"
            )
        for i, match in found.items():
            self.files[i] = match.file
        for front, (_, match) in sorted(examples.items()):
            count = sum(each.front == front for each in found.values())
            below = f", as files below {match.wrapper!r}" if match.wrapper else ""
            yield f"{count:,} paths of {self._table.path} are read without {front!r} in front{below}"

    def _longest_end(self, i: int, *, fold: bool, fronts: set[str]) -> _Tail | None:
        """The longest end of a path that is a file's path from a folder of the table or source, or in a wrapper."""
        for path in self._readings[i]:
            start = path.find("/", 1)
            while start > 0:
                front, end = path[:start], path[start + 1 :]
                for wrapper in dict.fromkeys(("", self._wrapper)) if not fronts or front in fronts else ():
                    if file := self._one(self._at(f"{wrapper}/{end}" if wrapper else end, fold=fold), i):
                        return _Tail(front, file, end.count("/") + 1, wrapper)
                start = path.find("/", start + 1)
        return None

    def _at(self, path: str, *, fold: bool) -> set[str]:
        """The files at a path relative to the table, the source or a folder between them; `fold`: loosely."""
        wanted = [f"{folder}/{path}" if folder else path for folder in self._above]
        if not fold:
            return {name for name in wanted if name in self._known}
        for loose, stem in ((False, True), (True, False), (True, True)):
            index = self._index(0, fold=loose, stem=stem)
            if found := {name for each in wanted for name in index.get(_loose(each) if loose else each, ())}:
                return found
        return set()

    def _trusted(self, found: dict[int, _Tail], rows: Sequence[int]) -> dict[int, _Tail]:
        """Those files that may be taken although they lack the folders in front which the table has.

        A split in front (`train/1.png`) must be that of the folder where the file is. A file name alone decides only
        where all paths of the table have the same folders, so that these say nothing. A folder around all files that
        the table does not know (`wrapper`) may stand for the one in front if all paths have that.
        """
        same_folder = len({posixpath.dirname(self._readings[i][0]) for i in rows}) == 1
        homes = {PurePosixPath(self._folder).name.casefold(), self._source_name.casefold()}
        fewest: dict[tuple[str, str], int] = {}
        for match in found.values():
            fewest[match.front, match.wrapper] = min(
                match.num_parts, fewest.get((match.front, match.wrapper), match.num_parts)
            )
        good = set()
        for (front, wrapper), num_parts in fewest.items():
            last = PurePosixPath(front).name.casefold()
            if wrapper:
                everywhere = all(self._readings[i][0].startswith(f"{front}/") for i in rows)
                trusted = everywhere and num_parts > 1 and not _splits_in(front) | _splits_in(wrapper)
            elif last in SPLIT_WORDS:
                trusted = last in homes
            else:
                trusted = num_parts > 1 or last in homes or same_folder
            good |= {(front, wrapper)} if trusted else set()
        return {i: match for i, match in found.items() if (match.front, match.wrapper) in good}


def _roots(source: str) -> list[str]:
    """What an absolute path below the source begins with, with a "/" at its end."""
    if "://" in source:
        return [f"{_plain(source.rstrip('/'))}/"]
    expanded = os.path.expanduser(source)
    return list(
        dict.fromkeys(f"{path.rstrip('/')}/" for path in (os.path.abspath(expanded), os.path.realpath(expanded)))
    )


def _parents(folder: str) -> list[str]:
    return ["" if str(parent) == "." else str(parent) for parent in PurePosixPath(folder).parents] if folder else []


def _readings(value: str) -> tuple[str, ...]:
    """The path as it is written, with "/" between its parts, and with the escapes of a URL resolved."""
    plain = _plain(value)
    if "%" not in value:
        return (plain,)
    return tuple(dict.fromkeys((plain, _plain(urllib.parse.unquote(value)))))


def _plain(value: str) -> str:
    """The path with "/" between its parts, absolute ones from "/" on: without a drive or the scheme of a URL."""
    if not _UNTIDY.search(value):
        return value
    path = _SCHEME.sub("/", value.replace("\\", "/"))
    path = posixpath.normpath(path) if path else ""
    return "/" + path.lstrip("/") if path.startswith("//") else path


def _splits_in(path: str, separator: str = "/") -> set[str]:
    """The splits that parts of a path are named after."""
    return {SPLIT_WORDS[part] for part in path.casefold().split(separator) if part in SPLIT_WORDS}


def _loose(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
