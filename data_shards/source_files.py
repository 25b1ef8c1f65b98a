"""Image sets of single files: a folder per class, or a CSV that names files, labels, groups and splits."""

from __future__ import annotations

import csv
import io
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_shards.config import DataConfig
from data_shards.decode import UndecodableImage
from data_shards.files import Files, open_files
from data_shards.source import Row

_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_LABEL_SEPARATOR = "|"


class FileSet:
    """Images that are files below `root` of `files`; a row's `where` is relative to it, in a tar as in a folder."""

    def __init__(self, files: Files, root: str, rows: list[Row], *, classes: tuple[str, ...], task: str):
        self._files, self._root = files, root
        self.rows, self.classes, self.task = rows, classes, task

    def read(self, row: Row) -> bytes:
        """The file's bytes, as they are. UndecodableImage where the file is there but cannot be read."""
        try:
            return self._files.read(posixpath.normpath(posixpath.join(self._root, row.where)))
        except OSError as error:  # a link to nowhere, no right to read it, a bad block
            raise UndecodableImage(f"cannot be read: {error.strerror or type(error).__name__}") from error


def open_folders(config: DataConfig) -> FileSet:
    """A set with one folder per class. Files beside the class folders are none of its images."""
    files, source = open_files(config.source), config.source
    root = _class_root(files, config.classes)
    found = _folders_in(files, root)
    if not found:
        raise ValueError(
            f"{source} has no folders: layout `folders` wants one folder per class, with its images inside"
        )
    if set(found) <= set(_SPLIT_WORDS):
        raise ValueError(
            f"{source} has the folders {', '.join(found)}, which look like splits, not classes: list the images in a "
            "CSV with a split column (--data.layout csv)"
        )
    classes = config.classes or tuple(found)
    extra = sorted(set(found) - set(classes))
    if extra:
        raise ValueError(
            f"folder {extra[0]!r} of {source} is none of the classes {', '.join(classes)}: move it away, or add it to "
            "--data.classes"
        )
    rows = []
    for index, name in enumerate(classes):
        members = [file[len(root) :] for file in files.names if file.startswith(f"{root}{name}/")]
        if not members:
            what = "is empty" if name in found else f"is missing (there are {', '.join(found)})"
            raise ValueError(f"class folder {name!r} of {source} {what}: put its images there, or mend --data.classes")
        rows += [Row(where, 0, (index,), None, None) for where in members]
    return FileSet(files, root, rows, classes=classes, task=config.task)


def _folders_in(files: Files, root: str) -> list[str]:
    return [f[len(root) :] for f in files.folders if f.startswith(root) and "/" not in f[len(root) :]]


def _class_root(files: Files, classes: Sequence[str]) -> str:
    """Where the class folders lie, "" or ending in "/": archives often wrap everything into one folder."""
    root = ""
    while True:
        inside = _folders_in(files, root)
        if len(inside) != 1 or inside[0] in classes or not _folders_in(files, f"{root}{inside[0]}/"):
            return root
        root += f"{inside[0]}/"


def open_csv(config: DataConfig) -> FileSet:
    """A set whose CSV names each image, its label, and maybe its group and split."""
    source, wanted = config.source, config.csv
    if source.lower().endswith(".csv"):
        folder, _, wanted = source.rpartition("/")
        source = folder or ("/" if source.startswith("/") else ".")
    files = open_files(source)
    path = _table_path(files, wanted, source)
    table = _Table(path, files.read(path))
    places = _places(table, config.image_column or "file", files.names)
    labels, classes = _labels(table, config)
    groups = table.column(config.group_column, "group") if config.group_column else None
    splits = table.column(config.split_column, "split") if config.split_column else None
    rows = []
    for i, (where, indices) in enumerate(zip(places, labels, strict=True)):
        if groups and not groups[i]:
            raise ValueError(
                f"{table.line(i)} has no {config.group_column!r}: every image needs its group, so fill it in"
            )
        if splits and splits[i].lower() not in _SPLIT_WORDS:
            raise ValueError(f"split {splits[i]!r} in {table.line(i)} is unknown: write train, val or test")
        split = _SPLIT_WORDS[splits[i].lower()] if splits else None
        rows.append(Row(where, 0, indices, split, groups[i] if groups else None))
    rows.sort(key=lambda row: row.where)
    return FileSet(files, table.folder, rows, classes=classes, task=config.task)


class _Table:
    """The CSV: columns by name, cells without the space around them."""

    def __init__(self, path: str, data: bytes):
        self.path, self.folder = path, posixpath.dirname(path)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
        head = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {path} is no CSV ({error}): mend it") from error
        if len(rows) < 2:
            raise ValueError(f"{path} has no rows: it needs a line of column names, then a line per image")
        self.names, self._lines = rows[0][1], [line for line, _ in rows[1:]]
        for line, cells in rows[1:]:
            if len(cells) != len(self.names):
                raise ValueError(f"line {line} of {path} has {len(cells)} cells for {len(self.names)} columns: mend it")
        self._cells = [cells for _, cells in rows[1:]]

    def column(self, name: str, use: str) -> list[str]:
        if name not in self.names:
            raise ValueError(
                f"{self.path} has no column {name!r} (it has {', '.join(self.names)}): name the column with "
                f"the {use} in --data.{use}-column"
            )
        position = self.names.index(name)
        return [cells[position] for cells in self._cells]

    def line(self, index: int) -> str:
        return f"line {self._lines[index]} of {self.path}"


def _table_path(files: Files, wanted: str, source: str) -> str:
    tables = [name for name in files.names if name.lower().endswith(".csv")]
    matching = [name for name in tables if name == wanted or name.endswith(f"/{wanted}")] if wanted else tables
    matching = [name for name in matching if name == wanted] or matching
    if len(matching) != 1:
        there = ", ".join(tables[:5]) or "no CSV at all"
        raise ValueError(
            f"{source} holds {len(matching)} files {wanted or '*.csv'} (it has {there}): name the one with the "
            "labels in --data.csv"
        )
    return matching[0]


def _labels(table: _Table, config: DataConfig) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """Class indices of each line, and the class names. A label is a name, or an index where names are given."""
    values = table.column(config.label_column or "label", "label")
    several = config.task == "multilabel"
    parts = [[p.strip() for p in v.split(_LABEL_SEPARATOR) if p.strip()] if several else [v] for v in values]
    classes = config.classes or _names_found(parts)
    index_of = {name: index for index, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):
        index_of |= {str(index): index for index in range(len(classes))}
    rows = []
    for i, names in enumerate(parts):
        for name in names:
            if name not in index_of:
                raise ValueError(
                    f"label {name!r} in {table.line(i)} is out of range: it must be one of {', '.join(classes)}; mend "
                    "the line or --data.classes"
                )
        rows.append(tuple(sorted({index_of[name] for name in names})))
    return rows, classes


def _names_found(parts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """All labels, sorted; whole numbers by value. An empty cell is no label, and so none of the names."""
    found = {name for names in parts for name in names if name}
    if all(name.isdecimal() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def _places(table: _Table, column: str, names: Sequence[str]) -> list[str]:
    """The path of each line's image relative to the CSV; bare names may lie in subfolders or lack their ending."""
    known = set(names)
    by_name: dict[str, set[str]] = defaultdict(set)
    for name in names:
        path = PurePosixPath(name)
        by_name[path.name].add(name)
        by_name[path.stem].add(name)
    places: list[str] = []
    lines: dict[str, int] = {}
    missing = []
    for i, value in enumerate(table.column(column, "image")):
        file = posixpath.normpath(posixpath.join(table.folder, value.replace("\\", "/")))
        if file not in known:
            candidates = by_name[value] - {table.path}
            if len(candidates) > 1:
                raise ValueError(
                    f"image {value!r} in {table.line(i)} may be any of {', '.join(sorted(candidates)[:3])}: write its "
                    "path"
                )
            if not candidates:
                missing.append(i)
                continue
            file = candidates.pop()
        if file in lines:
            raise ValueError(
                f"image {value!r} stands in {table.line(lines[file])} and again in {table.line(i)}: an image may stand "
                "there once, so keep one of them"
            )
        lines[file] = i
        places.append(posixpath.relpath(file, table.folder) if table.folder else file)
    if missing:
        values = table.column(column, "image")
        examples = ", ".join(f"{values[i]!r} in {table.line(i)}" for i in missing[:3])
        raise ValueError(
            f"{len(missing)} of {len(values)} rows of {table.path} name an image that is not there ({examples}): add "
            "the files, remove the rows, or mend --data.image-column"
        )
    return places
