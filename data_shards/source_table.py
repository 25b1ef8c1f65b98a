"""Rows of an image set that a table describes: files, labels, groups and splits."""

from __future__ import annotations

import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_shards.config import DataConfig
from data_shards.file_set import FileSet
from data_shards.files import Files, open_files
from data_shards.source import Row
from data_shards.split import SPLIT_WORDS
from data_shards.table import ENDINGS, Table, tables_among

_LABEL_SEPARATOR = "|"


def open_csv(config: DataConfig) -> FileSet:
    """A set whose table, CSV or XLSX, names each image, its label, and maybe its group and split."""
    source, wanted = config.source, config.csv
    if source.lower().endswith(ENDINGS):
        folder, _, wanted = source.rpartition("/")
        source = folder or ("/" if source.startswith("/") else ".")
    files = open_files(source)
    table = _table(files, wanted, source)
    places = _places(table, config.image_column or "file", files.names)
    labels, classes = _labels(table, config)
    groups = table.column(config.group_column, "group") if config.group_column else None
    splits = _splits(table, config) if config.split_column else None
    rows = []
    for i, (where, indices) in enumerate(zip(places, labels, strict=True)):
        if groups and not groups[i]:
            raise ValueError(
                f"{table.line(i)} has no {config.group_column!r}: every image needs its group, so fill it in"
            )
        if where:
            rows.append(Row(where, 0, indices, splits[i] if splits else None, groups[i] if groups else None))
    notes = (*_missing(table, places, config), *_unlisted(table, places, files.names))
    rows.sort(key=lambda row: row.where)
    return FileSet(files, table.folder, rows, config, classes=classes, notes=notes)


def _splits(table: Table, config: DataConfig) -> list[str]:
    meaning = SPLIT_WORDS | {
        value.strip().lower(): split for value, _, split in (pair.rpartition("=") for pair in config.split_values)
    }
    splits = table.column(config.split_column, "split")
    for i, value in enumerate(splits):
        if value.lower() not in meaning:
            raise ValueError(
                f"split {value!r} in {table.line(i)} is unknown: write train, val or test, or say what it means with "
                f"--data.split-values {value}=train"
            )
    return [meaning[value.lower()] for value in splits]


def _missing(table: Table, places: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """What to tell of rows without a file. ValueError where there are any and they may not be dropped."""
    missing = [i for i, where in enumerate(places) if not where]
    if not missing:
        return ()
    values = table.column(config.image_column or "file", "image")
    examples = ", ".join(f"{values[i]!r} in {table.line(i)}" for i in missing[:3])
    told = f"{len(missing)} of {len(values)} rows of {table.path} name an image that is not there ({examples})"
    if config.rows_without_file == "drop" and len(missing) < len(values):
        return (f"{told}: dropped",)
    raise ValueError(
        f"{told}: add the files, mend --data.image-column, or leave the rows out with --data.rows-without-file drop"
    )


def _unlisted(table: Table, places: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """What to tell of files that no row names: nobody has said what they show, so they are no images of the set."""
    named = {posixpath.normpath(posixpath.join(table.folder, where)) for where in places if where}
    others = [name for name in names if name not in named and not name.lower().endswith(ENDINGS)]
    if not others:
        return ()
    return (f"{len(others)} files have no row in {table.path} and are left out: {', '.join(others[:3])}",)


def _table(files: Files, wanted: str, source: str) -> Table:
    tables = tables_among(files.names)
    if wanted:
        matching = [name for name in tables if name == wanted or name.endswith(f"/{wanted}")]
        matching = [name for name in matching if name == wanted] or matching
    else:
        # Some sets come with the same table twice.
        matching = [name for name in tables if name.lower().endswith(".csv")] or tables
    if len(matching) != 1:
        there = ", ".join(tables[:5]) or "no table at all"
        raise ValueError(
            f"{source} holds {len(matching)} files {wanted or '*.csv'} (it has {there}): name the one with the "
            "labels in --data.csv"
        )
    try:
        return Table(matching[0], files.read(matching[0]))
    except OSError as error:
        raise ValueError(
            f"{matching[0]} of {source} cannot be read ({error.strerror or error}): get it again"
        ) from error


def _labels(table: Table, config: DataConfig) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
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


def _places(table: Table, column: str, names: Sequence[str]) -> list[str]:
    """The path of each line's image relative to the table, "" where there is none.

    Bare names may lie in subfolders, lack their ending, or differ from the file's in case or in how accents are coded.
    """
    known = set(names)
    by_name: dict[str, set[str]] = defaultdict(set)
    loosely: dict[str, set[str]] = defaultdict(set)
    for name in names:
        path = PurePosixPath(name)
        for each in (path.name, path.stem):
            by_name[each].add(name)
            loosely[_loose(each)].add(name)
    places: list[str] = []
    lines: dict[str, int] = {}
    for i, value in enumerate(table.column(column, "image")):
        file = posixpath.normpath(posixpath.join(table.folder, value.replace("\\", "/")))
        if file not in known:
            candidates = (by_name.get(value) or loosely.get(_loose(value)) or set()) - {table.path}
            if len(candidates) > 1:
                raise ValueError(
                    f"image {value!r} in {table.line(i)} may be any of {', '.join(sorted(candidates)[:3])}: write its "
                    "path, or remove the others"
                )
            if not candidates:
                places.append("")
                continue
            (file,) = candidates
        if file in lines:
            raise ValueError(
                f"image {value!r} stands in {table.line(lines[file])} and again in {table.line(i)}: an image may stand "
                "there once, so keep one of them"
            )
        lines[file] = i
        places.append(posixpath.relpath(file, table.folder) if table.folder else file)
    return places


def _loose(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
