"""The label column of a table: cells -> class indices, with a refusal or a notice for labels that are in doubt.

Doubtful are labels that may be several in one cell, two spellings of one class, or no label at all. What can be
understood in two ways is refused, and the message names the option that settles it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_shards.config import DataConfig
from data_shards.options import listed, option
from data_shards.source.labels import ClassEdits, composed, edit_notes, require_named
from data_shards.source.lookalikes import described, folded, trimmed
from data_shards.source.table.text_table import Table

# What programs write for a missing value: never a class unless somebody says so.
_MISSING = {"nan", "<na>", "nat", "na", "n/a", "#n/a", "#na", "null", "#value!", "#ref!", "#div/0!", "#name?", "#null!"}
# Words that may be a class or a missing value.
_PERHAPS_MISSING = {"none", "?", "-", "--", ".", "unknown", "missing"}
_NONE_OF_THEM = {
    "no finding", "no findings", "none", "normal", "negative", "healthy", "no abnormality", "no disease", "nothing",
}  # fmt: skip
_YES, _NO = {"1", "true", "yes", "t", "y"}, {"0", "false", "no", "f", "n"}
_NUMBER = re.compile(r"[+-]?\d{1,300}([.,]\d*)?")
# A class name hardly ever holds the first two; the others are judged by what stands between them.
_CERTAIN, _PERHAPS = ("|", ";"), (",", "/", "+", "&", "\n")
# Names of several words hold these, so only other labels can show that they separate.
_WORDS = (" and ", "\t", " ")


class Labels(NamedTuple):
    """Class indices of each row, None where the row is left out; the classes; what the owner should know."""

    indices: list[tuple[int, ...] | None]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Name:
    """A label as found in the rows that are kept."""

    name: str
    count: int
    line: str


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
    new = {i: _new_names(old[i], edits, none, table.line(i), several=_several(config)) for i in kept}
    rows = {i: names for i, names in new.items() if names is not None}
    if not rows:
        raise ValueError(f"--data.drop-classes leaves no row of {table.path}: name fewer classes")
    found = _found(rows, table)
    of_none = _Name(none, sum(none in old[i] for i in kept), "--data.no-finding") if none else None
    doubts = _Doubts(found, edits, config, separated=any(len(old[i]) > 1 for i in kept), none=of_none)
    notes = [*_two_codes(cells, table), *doubts.notes(), *_numbers_note(cells, old, kept, config)]
    complete = len(kept) == len(cells) and not edits
    classes = _classes(everything, found, edits, config, fixed=named or complete)
    notes += edit_notes(edits, Counter(n for i in kept for n in set(old[i] or ("",))), several=_several(config))
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
        name
        for name, cells in values.items()
        if cells <= {"", "-1", *_YES, *_NO} and cells & _YES and cells & {"", *_NO}
    ]


def _several(config: DataConfig) -> bool:
    return config.task == "multilabel"


def _old_names(cell: str, config: DataConfig) -> tuple[str, ...]:
    """The classes of a cell as the source calls them; an index becomes the name that it stands for."""
    if not _several(config):
        return (_named_by_index(composed(cell), config),)
    parts = (composed(part.strip()) for part in cell.split(config.label_separator))
    return tuple(_named_by_index(part, config) for part in parts if part)


def _named_by_index(name: str, config: DataConfig) -> str:
    """The class that a whole number (`1`, `1.0`) stands for, where classes are named and none of them is a number."""
    index = re.fullmatch(r"(\d{1,9})(\.0*)?", name, re.ASCII)
    if not index or any(_NUMBER.fullmatch(each) for each in config.classes):
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


def _found(rows: Mapping[int, tuple[str, ...]], table: Table) -> dict[str, _Name]:
    """The names in these rows, with the number of rows that have each and the first of them."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for i, names in rows.items():
        for name in set(names):
            counts[name] += 1
            first.setdefault(name, i)
    return {name: _Name(name, count, table.line(first[name])) for name, count in counts.items()}


def _classes(
    everything: set[str], found: Mapping[str, _Name], edits: ClassEdits, config: DataConfig, *, fixed: bool
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
    """What the owner should know of the classes: those without an image, and the order of grades nobody has named."""
    if gone := sorted(set(_classes_of(everything, edits, config)) - set(classes)):
        yield f"{table.path}: no image is left of {listed(gone)}, so the dataset does not have these classes"
    if config.task == "ordinal" and not config.classes and not all(map(_NUMBER.fullmatch, classes)):
        yield f"the order of the classes is that of the alphabet: {listed(classes)}; name them in --data.classes"


def sorted_names(names: set[str]) -> list[str]:
    """The names in order; by value where all of them are numbers."""
    if all(_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (_value(name), name))
    return sorted(names)


def _value(number: str) -> float:
    return float(number.replace(",", "."))


def _require_classes(
    found: Mapping[str, _Name], index_of: Mapping[str, int], classes: Sequence[str], config: DataConfig
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
        alike = [name for name in classes if _look(name) == _look(each.name)]
        remedies = [option("class-map", f"{each.name}={alike[0]}")] if alike else []
        if _several(config) and not alike:
            remedies.append(f"{option('no-finding', each.name)} if it means none of them")
        remedies += [f"leave it out with {option('drop-classes', each.name)}", "correct the line or --data.classes"]
        raise ValueError(
            f"label {described(each.name)} in {each.line} ({each.count:,} rows) is out of range: it must be one of "
            f"{listed(classes)}; {', '.join(remedies[:-1])}, or {remedies[-1]}"
        )


# --- what is in doubt


def says_missing(cell: str) -> bool:
    """Whether a cell, of a column where it is not a class, says that its value is not known."""
    return _spelling(cell)[1] in _MISSING | _PERHAPS_MISSING


def _two_codes(cells: Sequence[str], table: Table) -> Iterator[str]:
    """A notice for labels that differ only in how Unicode codes their accents: they are one class."""
    codes: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        codes[composed(cell)].add(cell)
    for name, written in sorted(codes.items()):
        if len(written) > 1:
            yield f"label {name!r} of {table.path} is coded in {len(written)} ways (NFC and NFD): read as one"


def _numbers_note(
    cells: Sequence[str], old: Sequence[tuple[str, ...]], kept: Sequence[int], config: DataConfig
) -> Iterator[str]:
    """A notice that numbers are read as indices of the classes, and as which."""
    read: dict[str, str] = {}
    for i in kept:
        parts = cells[i].split(config.label_separator) if _several(config) else [cells[i]]
        written = [composed(part.strip()) for part in parts if part.strip()]
        read |= {number: name for number, name in zip(written, old[i], strict=False) if number != name}
    if read:
        pairs = ", ".join(f"{number} is {read[number]}" for number in sorted_names(set(read))[:10])
        yield f"labels that are numbers are read as indices of the classes: {pairs}"


class _Doubts:
    """What may be wrong with the labels of a table. `settled` names are meant as they are: the user named them.

    `none` is the label that means none of the classes, if there is one; it is not among those found.
    """

    def __init__(
        self, found: Mapping[str, _Name], edits: ClassEdits, config: DataConfig, *, separated: bool, none: _Name | None
    ):
        self._found, self._config, self._separated = found, config, separated
        self._none = {none.name: none} if none else {}
        self._settled = set(map(composed, config.classes)) | edits.new_names
        self._open = {name: each for name, each in found.items() if name and name not in self._settled}
        self._several = _several(config)

    def notes(self) -> list[str]:
        """Notices. ValueError where labels can be understood in two ways."""
        self._refuse_missing()
        self._refuse_lists()
        together = [note for separator in (*_CERTAIN, *_PERHAPS, *_WORDS) for note in self._together(separator)]
        self._refuse_alike()
        return [*together, *self._nearly_alike(), *self._words()]

    def _refuse_missing(self) -> None:
        missing = [each for each in self._open.values() if each.name.casefold() in _MISSING]
        if missing:
            told = ", ".join(f"{each.name!r} ({each.count:,} rows, {each.line})" for each in missing)
            written = [each.name for each in missing]
            raise ValueError(
                f"label {told} is what programs write for a missing value: leave these rows out with "
                f"{option('drop-classes', *written)}, or, if it is a class, keep it with "
                f"{option('class-map', *(f'{name}={name}' for name in written))}"
            )

    def _refuse_lists(self) -> None:
        for each in self._open.values():
            if (each.name[0], each.name[-1]) in {("[", "]"), ("{", "}")}:
                raise ValueError(
                    f"label {each.name!r} in {each.line} looks like a list: write the names alone, with | between them "
                    "if there are several (--data.task multilabel)"
                )

    def _together(self, separator: str) -> Iterator[str]:
        """Labels that seem to be several in one cell: refused where it is likely, a notice where it is possible."""
        if self._several and separator == self._config.label_separator:
            return
        joined = {
            name: frozenset(filter(None, map(str.strip, name.split(separator))))
            for name in self._open
            if separator in name
        }
        if separator not in _CERTAIN:
            joined = {name: parts for name, parts in joined.items() if len(parts) > 1}
        alone = self._all_names()
        if separator in _WORDS:
            joined = _suspected(joined, alone)
        if not joined:
            return
        first = self._open[min(joined, key=lambda name: (not joined[name] <= alone, name))]
        total = sum(self._open[name].count for name in joined)
        told = f"label {first.name!r} ({first.line}; {total:,} rows are of this kind)"
        remedy = f"{'' if self._several else '--data.task multilabel '}{option('label-separator', separator)}"
        unseparated = self._several and separator == "," and not self._separated
        if unseparated or _likely(separator, joined, alone):
            raise ValueError(
                f"{told} seems to be several labels in one cell: if so, say {remedy}; if each is one class, name the "
                f"classes in --data.classes, or keep them with "
                f"{option('class-map', *(f'{name}={name}' for name in sorted(joined)[:10]))}"
            )
        if 2 * total > sum(each.count for each in self._found.values()):
            yield f"{told} is read as one class: if it is several labels, say {remedy}"

    def _all_names(self) -> set[str]:
        return {*self._found, *self._settled, *self._none}

    def _refuse_alike(self) -> None:
        """ValueError for labels that are two spellings of one."""
        spellings: dict[object, list[_Name]] = defaultdict(list)
        truths: dict[object, list[_Name]] = defaultdict(list)
        only_truths = {name.casefold() for name in self._found} <= _YES | _NO
        for name in sorted(self._all_names()):
            each = self._none.get(name) or self._found.get(name, _Name(name, 0, "--data.classes"))
            spellings[_look(name)].append(each)
            if only_truths and name.casefold() in _YES | _NO:
                truths[name.casefold() in _YES].append(each)
        same = [*truths.values()] if only_truths else [*spellings.values()]
        clashes = [group for group in same if len(group) > 1 and any(each.name in self._open for each in group)]
        if not clashes:
            return
        told, pairs = [], []
        for group in clashes:
            target = max(group, key=self._rank).name
            told.append(" and ".join(f"{described(each.name)} ({each.count:,} rows, {each.line})" for each in group))
            pairs += [f"{e.name}={target}" for e in group if e.name != target and e.name in self._open]
        raise ValueError(
            f"labels {'; '.join(told)} seem to be one class: read them as one with {option('class-map', *pairs)}, or, "
            "if they are not, name the classes in --data.classes"
        )

    def _rank(self, each: _Name) -> tuple[bool, bool, int, int]:
        """Of several spellings, the highest is the one to keep."""
        return each.name in self._none, each.name in self._settled, each.count, -len(each.name)

    def _nearly_alike(self) -> Iterator[str]:
        """A notice for labels of which only the punctuation between words differs."""
        loosely: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._all_names(), key=lambda name: (name in self._none, name)):
            loosely[re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", _spelling(name)[1])].append(name)
        for names in loosely.values():
            if len(names) > 1 and set(names) & set(self._open):
                yield (
                    f"labels {' and '.join(map(repr, names))} are read as {len(names)} classes: if they are one, say "
                    f"{option('class-map', *(f'{name}={names[-1]}' for name in names[:-1]))}"
                )

    def _words(self) -> Iterator[str]:
        """Notices for words that may mean that nothing is known, or that nothing was found."""
        for each in self._open.values():
            told = f"label {each.name!r} ({each.count:,} rows, {each.line})"
            word = _spelling(each.name)[1].replace("_", " ")
            if self._several and word in _NONE_OF_THEM:
                joined = (option("class-map", f"{each.name}={name}") for name in self._none)
                yield (
                    f"{told} is read as a class of its own: if it means none of the classes, say "
                    f"{next(joined, option('no-finding', each.name))}"
                )
            elif word in _PERHAPS_MISSING:
                yield (
                    f"{told} is read as a class: if it means that the label is not known, leave it out with "
                    f"{option('drop-classes', each.name)}"
                )


def _suspected(joined: Mapping[str, frozenset[str]], alone: set[str]) -> dict[str, frozenset[str]]:
    """Those of which all parts are labels themselves, or which are there in two orders (`A B` and `B A`)."""
    orders: dict[frozenset[str], set[object]] = defaultdict(set)  # two spellings of one name are not two orders
    for name, parts in joined.items():
        orders[parts].add(_spelling(name))
    return {name: parts for name, parts in joined.items() if parts <= alone or len(orders[parts]) > 1}


def _likely(separator: str, joined: Mapping[str, frozenset[str]], alone: set[str]) -> bool:
    """Whether labels with this separator are probably several: by it, by parts that are labels too or come back."""
    if separator in (*_CERTAIN, *_WORDS) or any(parts <= alone for parts in joined.values()):
        return True
    if all(_NUMBER.fullmatch(name) for name in joined):  # decimal commas
        return False
    if len(set(joined.values())) < len(joined):  # `A, B` and `B, A`
        return True
    times = Counter(part for parts in joined.values() for part in parts)
    return len(joined) > 2 and all(count > 1 for count in times.values())


def _look(name: str) -> tuple[str, str]:
    """The same for names whose difference cannot be seen, such as a dot after one of them."""
    return _spelling(trimmed(folded(name)))


def _spelling(name: str) -> tuple[str, str]:
    """What two spellings of one class have in common: the value of a number, a text as `folded` gives it."""
    text = folded(name)
    if _NUMBER.fullmatch(text):
        value = _value(text)
        return ("number", f"{value:.17g}" if math.isfinite(value) else text)
    return ("text", text)
