"""The label column of a table: cells -> class indices, with a refusal or a notice for labels that are in doubt.

Doubtful are labels that may be several in one cell, two spellings of one class, or no label at all. What can be
understood in two ways is refused, and the message names the option that settles it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from data_shards.config import DataConfig
from data_shards.options import listed, option
from data_shards.source.labels import ClassEdits, composed, edit_notes, require_named
from data_shards.source.lookalikes import described
from data_shards.source.table.label_doubts import (
    NO,
    NUMBER,
    YES,
    Doubts,
    Name,
    look,
    numbers_note,
    several,
    sorted_names,
    two_codes,
)
from data_shards.source.table.text_table import Table


class Labels(NamedTuple):
    """Class indices of each row, None where the row is left out; the classes; what the owner should know."""

    indices: list[tuple[int, ...] | None]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def read_labels(table: Table, kept: Sequence[int], config: DataConfig, *, named: bool) -> Labels:
    """The labels of the rows `kept`, in their order.

    A label is a class name, or an index where names are given. `named`: the user named the classes, so that one
    without images stays a class.

    Raises ValueError for a missing or unknown label, and for labels that can be understood in two ways.
    """
    cells = _cells(table, config)
    names_of = {cell: _old_names(cell, config) for cell in set(cells)}
    old = [names_of[cell] for cell in cells]
    edits, none = ClassEdits(config), composed(config.no_finding.strip())
    everything = {name for names in old for name in names or ("",)}
    edits.require_known({*everything, *config.classes}, f"the label column of {table.path}")
    _require_none_known(everything, none, edits, table)
    new = {i: _new_names(old[i], edits, none, table.line(i), several=several(config)) for i in kept}
    rows = {i: names for i, names in new.items() if names is not None}
    if not rows:
        raise ValueError(f"--data.drop-classes leaves no row of {table.path}: name fewer classes")
    found = _found(rows, table)
    of_none = Name(none, sum(none in old[i] for i in kept), "--data.no-finding") if none else None
    doubts = Doubts(found, edits, config, separated=any(len(old[i]) > 1 for i in kept), none=of_none)
    notes = [*two_codes(cells, table), *doubts.notes(), *numbers_note(cells, old, kept, config)]
    complete = len(kept) == len(cells) and not edits
    classes = _classes(everything, found, edits, config, fixed=named or complete)
    notes += edit_notes(edits, Counter(n for i in kept for n in set(old[i] or ("",))), several=several(config))
    notes += _classes_note(everything, classes, edits, config, table)
    index_of = {composed(name): index for index, name in enumerate(classes)}
    _require_classes(found, index_of, classes, config)
    indices = {i: tuple(sorted({index_of[name] for name in names})) for i, names in rows.items()}
    return Labels([indices.get(i) for i in kept], classes, tuple(notes))


def _cells(table: Table, config: DataConfig) -> list[str]:
    column = config.label_column or "label"
    indicators = [] if column in table.names else _indicators(table)
    if len(indicators) > 1:
        raise ValueError(
            f"{table.path} has no column {column!r}, but {len(indicators)} columns of 0 and 1 ({listed(indicators)}), "
            "which seem to be one class each: add one column with the names of the columns that hold 1, separated by "
            f"{config.label_separator!r}, and name it in --data.label-column (with --data.task multilabel if an image "
            "can have several)"
        )
    return table.column(column, "label")


def _indicators(table: Table) -> list[str]:
    """Columns that say by 1 and 0 whether a class is there; -1 and empty cells are uncertain ones."""
    unique = [name for name in table.names if name and table.names.count(name) == 1]
    values = {name: {cell.lower().removesuffix(".0") for cell in table.column(name, "label")} for name in unique}
    return [
        name for name, cells in values.items() if cells <= {"", "-1", *YES, *NO} and cells & YES and cells & {"", *NO}
    ]


def _old_names(cell: str, config: DataConfig) -> tuple[str, ...]:
    """The classes of a cell as the source calls them; an index becomes the name that it stands for."""
    if not several(config):
        return (_named_by_index(composed(cell), config),)
    parts = (composed(part.strip()) for part in cell.split(config.label_separator))
    return tuple(_named_by_index(part, config) for part in parts if part)


def _named_by_index(name: str, config: DataConfig) -> str:
    """The class that a whole number (`1`, `1.0`) stands for, where classes are named and none of them is a number."""
    index = re.fullmatch(r"(\d{1,9})(\.0*)?", name, re.ASCII)
    if not index or any(NUMBER.fullmatch(each) for each in config.classes):
        return name
    if any(composed(pair.rpartition("=")[0].strip()) == name for pair in config.class_map):
        return name
    number = int(index[1])
    return composed(config.classes[number]) if number < len(config.classes) else name


def _require_none_known(names: set[str], none: str, edits: ClassEdits, table: Table) -> None:
    if none and none not in names | edits.new_names:
        raise ValueError(
            f"--data.no-finding is {none!r}, but no row of {table.path} has this label (there are "
            f"{listed(sorted(names))}): correct it or leave it out"
        )


def _new_names(
    old: tuple[str, ...], edits: ClassEdits, none: str, line: str, *, several: bool
) -> tuple[str, ...] | None:
    """The classes of a row after leaving out and renaming; None where the row is left out."""
    if not several or (not old and "" in edits.old_names):
        name = edits.new_name(old[0] if old else "")
        return None if name is None else (name,)
    new = tuple(name for name in map(edits.new_name, old) if name is not None)
    others = tuple(name for name in new if not none or name != none)
    if others and len(others) < len(new):
        raise ValueError(
            f"{line} has {none!r}, which means none of the classes (--data.no-finding), together with {others[0]!r}: "
            "correct the line"
        )
    return others


def _found(rows: Mapping[int, tuple[str, ...]], table: Table) -> dict[str, Name]:
    """The names in these rows, with the number of rows that have each and the first of them."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for i, names in rows.items():
        for name in set(names):
            counts[name] += 1
            first.setdefault(name, i)
    return {name: Name(name, count, table.line(first[name])) for name, count in counts.items()}


def _classes(
    everything: set[str], found: Mapping[str, Name], edits: ClassEdits, config: DataConfig, *, fixed: bool
) -> tuple[str, ...]:
    """The dataset's classes: those found, or those of the configuration; unless `fixed` without those that lost all
    rows."""
    classes = _classes_of(everything, edits, config)
    if config.classes:
        require_named([*classes, *filter(None, [config.no_finding.strip()])], edits)
        if fixed:
            return classes
    return tuple(name for name in classes if composed(name) in found)


def _classes_of(names: set[str], edits: ClassEdits, config: DataConfig) -> tuple[str, ...]:
    """The classes that there would be with an image for every row. Rows without a label come last, if they get one."""
    none = composed(config.no_finding.strip())
    unlabelled = [""] if "" in edits.old_names else []
    classes = edits.classes(config.classes or [*sorted_names(names - {""}), *unlabelled])
    return tuple(name for name in classes if not none or composed(name) != none)


def _classes_note(
    everything: set[str], classes: tuple[str, ...], edits: ClassEdits, config: DataConfig, table: Table
) -> Iterator[str]:
    """Notes on the classes: those without an image, and the order of grades that the user did not name."""
    if gone := sorted(set(_classes_of(everything, edits, config)) - set(classes)):
        yield f"{table.path}: no image is left of {listed(gone)}, so the dataset does not have these classes"
    if config.task == "ordinal" and not config.classes and not all(map(NUMBER.fullmatch, classes)):
        yield f"the order of the classes is that of the alphabet: {listed(classes)}; name them in --data.classes"


def _require_classes(
    found: Mapping[str, Name], index_of: Mapping[str, int], classes: Sequence[str], config: DataConfig
) -> None:
    """ValueError for a label that is missing or none of the classes."""
    for each in found.values():
        if each.name in index_of:
            continue
        if not each.name:
            raise ValueError(
                f"{each.count:,} rows have no label ({each.line}): fill it in, or leave these rows out with "
                f"{option('drop-classes', '')}"
            )
        alike = [name for name in classes if look(name) == look(each.name)]
        remedies = [option("class-map", f"{each.name}={alike[0]}")] if alike else []
        if several(config) and not alike:
            remedies.append(f"{option('no-finding', each.name)} if it means none of them")
        remedies += [f"leave it out with {option('drop-classes', each.name)}", "correct the line or --data.classes"]
        raise ValueError(
            f"label {described(each.name)} in {each.line} ({each.count:,} rows) is out of range: it must be one of "
            f"{listed(classes)}; {', '.join(remedies[:-1])}, or {remedies[-1]}"
        )
