"""Labels of a table that are in doubt: several in one cell, two spellings of one class, or a missing value.

What can be understood in two ways is refused, and the message names the option that settles it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_shards.config import DataConfig
from data_shards.options import option
from data_shards.source.labels import ClassEdits, composed
from data_shards.source.lookalikes import described, folded, trimmed
from data_shards.source.table.text_table import Table

# What programs write for a missing value: never a class unless the user says so.
_MISSING = {"nan", "<na>", "nat", "na", "n/a", "#n/a", "#na", "null", "#value!", "#ref!", "#div/0!", "#name?", "#null!"}
# Words that may be a class or a missing value.
_PERHAPS_MISSING = {"none", "?", "-", "--", ".", "unknown", "missing"}
_NONE_OF_THEM = {
    "no finding", "no findings", "none", "normal", "negative", "healthy", "no abnormality", "no disease", "nothing",
}  # fmt: skip
YES, NO = {"1", "true", "yes", "t", "y"}, {"0", "false", "no", "f", "n"}
NUMBER = re.compile(r"[+-]?\d{1,300}([.,]\d*)?")
# A class name hardly ever holds the first two; the others are judged by the parts between them.
_CERTAIN, _PERHAPS = ("|", ";"), (",", "/", "+", "&", "\n")
# Names of several words hold these, so only other labels can show that they separate.
_WORDS = (" and ", "\t", " ")


@dataclass(frozen=True)
class Name:
    """A label as found in the rows that are kept."""

    name: str
    count: int
    line: str


def several(config: DataConfig) -> bool:
    """Whether an image may have any number of labels."""
    return config.task == "multilabel"


def sorted_names(names: set[str]) -> list[str]:
    """The names in order; by value where all of them are numbers."""
    if all(NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (_value(name), name))
    return sorted(names)


def _value(number: str) -> float:
    return float(number.replace(",", "."))


def says_missing(cell: str, *, certainly: bool = False) -> bool:
    """Whether a cell, of a column where it is not a class, says that its value is not known.

    `certainly`: only words that programs write, not words such as `none`, which may be a value.
    """
    return _spelling(cell)[1] in (_MISSING if certainly else _MISSING | _PERHAPS_MISSING)


def two_codes(cells: Sequence[str], table: Table) -> Iterator[str]:
    """A notice for labels that differ only in how Unicode codes their accents: they are one class."""
    codes: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        codes[composed(cell)].add(cell)
    for name, written in sorted(codes.items()):
        if len(written) > 1:
            yield f"label {name!r} of {table.path} is coded in {len(written)} ways (NFC and NFD): read as one"


def numbers_note(
    cells: Sequence[str], old: Sequence[tuple[str, ...]], kept: Sequence[int], config: DataConfig
) -> Iterator[str]:
    """A notice that numbers are read as indices of the classes, and as which."""
    read: dict[str, str] = {}
    for i in kept:
        parts = cells[i].split(config.label_separator) if several(config) else [cells[i]]
        written = [composed(part.strip()) for part in parts if part.strip()]
        read |= {number: name for number, name in zip(written, old[i], strict=False) if number != name}
    if read:
        pairs = ", ".join(f"{number} is {read[number]}" for number in sorted_names(set(read))[:10])
        yield f"labels that are numbers are read as indices of the classes: {pairs}"


class Doubts:
    """What may be wrong with the labels of a table. `settled` names are meant as they are: the user named them.

    `none` is the label that means none of the classes, if there is one; it is not among those found.
    """

    def __init__(
        self, found: Mapping[str, Name], edits: ClassEdits, config: DataConfig, *, separated: bool, none: Name | None
    ):
        self._found, self._config, self._separated = found, config, separated
        self._none = {none.name: none} if none else {}
        self._settled = set(map(composed, config.classes)) | edits.new_names
        self._open = {name: each for name, each in found.items() if name and name not in self._settled}
        self._several = several(config)

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
            shown = ", ".join(f"{each.name!r} ({each.count:,} rows, {each.line})" for each in missing)
            written = [each.name for each in missing]
            raise ValueError(
                f"label {shown} is what programs write for a missing value: leave these rows out with "
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
        shown = f"label {first.name!r} ({first.line}; {total:,} rows are of this kind)"
        remedy = f"{'' if self._several else '--data.task multilabel '}{option('label-separator', separator)}"
        unseparated = self._several and separator == "," and not self._separated
        if unseparated or _likely(separator, joined, alone):
            raise ValueError(
                f"{shown} seems to be several labels in one cell: if so, say {remedy}; if each is one class, name the "
                f"classes in --data.classes, or keep them with "
                f"{option('class-map', *(f'{name}={name}' for name in sorted(joined)[:10]))}"
            )
        if 2 * total > sum(each.count for each in self._found.values()):
            yield f"{shown} is read as one class: if it is several labels, say {remedy}"

    def _all_names(self) -> set[str]:
        return {*self._found, *self._settled, *self._none}

    def _refuse_alike(self) -> None:
        """ValueError for labels that are two spellings of one."""
        spellings: dict[object, list[Name]] = defaultdict(list)
        truths: dict[object, list[Name]] = defaultdict(list)
        only_truths = {name.casefold() for name in self._found} <= YES | NO
        for name in sorted(self._all_names()):
            each = self._none.get(name) or self._found.get(name, Name(name, 0, "--data.classes"))
            spellings[look(name)].append(each)
            if only_truths and name.casefold() in YES | NO:
                truths[name.casefold() in YES].append(each)
        same = [*truths.values()] if only_truths else [*spellings.values()]
        clashes = [group for group in same if len(group) > 1 and any(each.name in self._open for each in group)]
        if not clashes:
            return
        shown, pairs = [], []
        for group in clashes:
            target = max(group, key=self._rank).name
            shown.append(" and ".join(f"{described(each.name)} ({each.count:,} rows, {each.line})" for each in group))
            pairs += [f"{e.name}={target}" for e in group if e.name != target and e.name in self._open]
        raise ValueError(
            f"labels {'; '.join(shown)} seem to be one class: read them as one with {option('class-map', *pairs)}, or, "
            "if they are not, name the classes in --data.classes"
        )

    def _rank(self, each: Name) -> tuple[bool, bool, int, int]:
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
            shown = f"label {each.name!r} ({each.count:,} rows, {each.line})"
            word = _spelling(each.name)[1].replace("_", " ")
            if self._several and word in _NONE_OF_THEM:
                joined = (option("class-map", f"{each.name}={name}") for name in self._none)
                yield (
                    f"{shown} is read as a class of its own: if it means none of the classes, say "
                    f"{next(joined, option('no-finding', each.name))}"
                )
            elif word in _PERHAPS_MISSING:
                yield (
                    f"{shown} is read as a class: if it means that the label is not known, leave it out with "
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
    if all(NUMBER.fullmatch(name) for name in joined):  # decimal commas
        return False
    if len(set(joined.values())) < len(joined):  # `A, B` and `B, A`
        return True
    times = Counter(part for parts in joined.values() for part in parts)
    return len(joined) > 2 and all(count > 1 for count in times.values())


def look(name: str) -> tuple[str, str]:
    """The same for names whose difference cannot be seen, such as a dot after one of them."""
    return _spelling(trimmed(folded(name)))


def _spelling(name: str) -> tuple[str, str]:
    """What two spellings of one class have in common: the value of a number, a text as `folded` gives it."""
    text = folded(name)
    if NUMBER.fullmatch(text):
        value = _value(text)
        return ("number", f"{value:.17g}" if math.isfinite(value) else text)
    return ("text", text)
