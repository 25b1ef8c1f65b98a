"""Rows of an image set that a table describes: files, labels, groups and splits."""

from __future__ import annotations

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from data_shards.config import DataConfig
from data_shards.options import option
from data_shards.source.file_set import FileList
from data_shards.source.files.files import Files
from data_shards.source.files.links import broken_links
from data_shards.source.files.open import open_files
from data_shards.source.labels import composed, grouped_by_path
from data_shards.source.lookalikes import described, folded, trimmed
from data_shards.source.row import Row
from data_shards.source.table.image_paths import Places, find_images
from data_shards.source.table.label_cells import read_labels
from data_shards.source.table.label_doubts import says_missing
from data_shards.source.table.metadata_columns import read_metadata
from data_shards.source.table.text_table import ENDINGS, Table, tables_among
from data_shards.split import split_of_cell

_MOST_WORDS = 20  # in a remedy


def list_table(config: DataConfig, *, classes_named: bool = True) -> FileList:
    """A set whose table, CSV, TSV or XLSX, names each image, its label, and maybe its group and split.

    Rows without a file, and of classes that are left out, say nothing about classes, groups and splits. A class that
    has no row left is a class only if the user named it (`classes_named`).
    """
    source, wanted = config.source, config.table
    if source.lower().endswith(ENDINGS):
        folder, _, wanted = source.rpartition("/")
        source = folder or ("/" if source.startswith("/") else ".")
    files = open_files(source)
    table = _table(files, wanted, source)
    places = find_images(table.column(config.image_column or "file", "image"), table, files.names, source)
    missing = _missing(table, places, files, config)
    there = [i for i, file in enumerate(places.files) if file]
    labels = read_labels(table, there, config, named=classes_named)
    kept = {i: indices for i, indices in zip(there, labels.indices, strict=True) if indices is not None}
    groups = _groups(table, list(kept), config)
    splits = _splits(table, list(kept), config)
    metadata = read_metadata(table, list(kept), config)
    rows = [
        Row(_from_table(table, places.files[i]), 0, indices, splits.get(i), groups.get(i), metadata=metadata.get(i, ()))
        for i, indices in kept.items()
    ]
    rows = sorted(grouped_by_path(rows, config), key=lambda row: row.where)
    notes = (
        *missing,
        *_unlisted(table, places, files.names),
        *places.notes,
        *labels.notes,
        *_alike_groups(groups.values(), table),
    )
    return FileList(files, table.folder, rows, labels.classes, notes)


def _from_table(table: Table, file: str) -> str:
    return posixpath.relpath(file, table.folder) if table.folder else file


def _groups(table: Table, kept: Sequence[int], config: DataConfig) -> dict[int, str]:
    """The group of each of these rows, if a column names them."""
    if not config.group_column:
        return {}
    groups = [composed(group) for group in table.column(config.group_column, "group")]
    for i in kept:
        if not groups[i]:
            raise ValueError(
                f"{table.line(i)} has no {config.group_column!r}: every image needs its group, so fill it in"
            )
    if unknown := [i for i in kept if says_missing(groups[i])]:
        raise ValueError(
            f"{config.group_column!r} is {groups[unknown[0]]!r} in {table.line(unknown[0])} ({len(unknown):,} rows "
            "have such a word), which says that the group is not known: every image needs its group, so fill it in, "
            "with a name of its own for each group"
        )
    return {i: groups[i] for i in kept}


def _alike_groups(groups: Iterable[str], table: Table) -> tuple[str, ...]:
    """A notice about groups that differ only in case, spaces or how a number is written: each may be in two splits."""
    counts = Counter(groups)
    spellings: dict[str, list[str]] = defaultdict(list)
    for group in sorted(counts):
        text = trimmed(folded(group))
        number = re.fullmatch(r"0*(\d+)(?:[.,]0*)?", text)
        spellings[number[1] if number else text].append(group)
    alike = [names for names in spellings.values() if len(names) > 1]
    if not alike:
        return ()
    shown = "; ".join(
        " and ".join(f"{described(name)} ({counts[name]:,} rows)" for name in names) for names in alike[:3]
    )
    return (
        f"groups of {table.path} that differ only in how they are written are read as different ones, "
        f"{len(alike):,} times: {shown}{', ...' if len(alike) > 3 else ''}; if they are one, write them alike, or its "
        "images may be in two splits",
    )


def _splits(table: Table, kept: Sequence[int], config: DataConfig) -> dict[int, str]:
    """The split of each of these rows, if a column names them."""
    if not config.split_column:
        return {}
    pairs = [pair.rpartition("=") for pair in config.split_values]
    given = {composed(value.strip()).lower(): split for value, _, split in pairs}
    cells = [composed(cell) for cell in table.column(config.split_column, "split")]
    meaning = {cell: given.get(cell.lower()) or split_of_cell(cell) for cell in {cells[i] for i in kept}}
    if unknown := [i for i in kept if not meaning[cells[i]]]:
        raise ValueError(_unknown_splits(table, cells, unknown, [*config.split_values]))
    return {i: meaning[cells[i]] for i in kept}


def _unknown_splits(table: Table, cells: Sequence[str], unknown: Sequence[int], given: Sequence[str]) -> str:
    """What to say of cells that name no split; the remedy leaves open which split each of them means."""
    first, words = unknown[0], list(dict.fromkeys(cells[i] for i in unknown))
    shown = f"split {cells[first]!r} in {table.line(first)} is unknown"
    if not cells[first]:
        shown = f"{sum(not cells[i] for i in unknown):,} rows have no split ({table.line(first)})"
    return (
        f"{shown}: write train, val or test there, or say what it means with "
        f"{option('split-values', *given, *(f'{word}=...' for word in words[:_MOST_WORDS]))} (train, val or test in "
        "place of the dots)"
    )


def _missing(table: Table, places: Places, files: Files, config: DataConfig) -> tuple[str, ...]:
    """A notice about rows without a file. ValueError where there are any and they may not be dropped."""
    missing = [i for i, file in enumerate(places.files) if not file]
    if not missing:
        return ()
    values = table.column(config.image_column or "file", "image")
    examples = ", ".join(f"{values[i]!r} in {table.line(i)}" for i in missing[:3])
    count = f"{len(missing):,} of {len(values):,} rows of {table.path} name an image that is not there ({examples})"
    listed = set(places.files)
    if broken := broken_links({name: why for name, why in files.broken.items() if name not in listed}):
        count += f"; {''.join(broken)}"
    if config.rows_without_file == "drop" and len(missing) < len(values):
        return (f"{count}: dropped",)
    raise ValueError(
        f"{count}; looked {places.looked}: add the files, correct --data.image-column, or leave the rows out with "
        "--data.rows-without-file drop"
    )


def _unlisted(table: Table, places: Places, names: Sequence[str]) -> tuple[str, ...]:
    """A notice about files that no row names: what they show is unknown, so they are not images of the set."""
    named = set(places.files)
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
        # Some sets come with the same table twice, in two formats.
        of_kind = [[name for name in tables if name.lower().endswith(ending)] for ending in ENDINGS]
        matching = next((some for some in of_kind if some), [])
    if len(matching) != 1:
        there = ", ".join(tables[:5]) or "no table at all"
        raise ValueError(
            f"{source} holds {len(matching)} files {wanted or '*.csv'} (it has {there}): name the one with the "
            "labels in --data.table"
        )
    try:
        return Table(matching[0], files.read(matching[0]))
    except OSError as error:
        raise ValueError(
            f"{matching[0]} of {source} cannot be read ({error.strerror or error}): get it again"
        ) from error
