"""Words of earlier releases: the one table of the settings, values and commands that have a new name.

Users write and read the new words. The old ones are accepted for one release. Stored files and digests keep them, so
that a rename makes no dataset and no step another one, and an earlier release can still read what this one writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, model_validator

SINCE, GOES = "0.1.0", "0.2.0"


@dataclass(frozen=True)
class Renamed:
    """A row of the table: a dotted key or `key=value`, or a word of the command line or of its JSON output."""

    old: str
    new: str
    since: str = SINCE
    goes: str = GOES
    """The release that no longer accepts the old word; empty: it stays an alias."""

    @property
    def fate(self) -> str:
        """What becomes of the old word, as a clause."""
        return f"the old name goes away in the next release ({self.goes})" if self.goes else "the old name stays valid"


SETTINGS = (
    Renamed("data.leaks", "data.duplicates"),
    Renamed("data.csv", "data.table"),
    Renamed("data.layout=csv", "data.layout=table", goes=""),
    Renamed("data.dicom.identifying=set-aside", "data.dicom.identifying=quarantine"),
    Renamed("placement.trials", "placement.concurrent_trials"),
)
"""A key stands for all keys below it."""
COMMANDS = (Renamed("shards leaks", "shards duplicates"),)
"""Commands, without `medmamba`."""
OUTPUT = (
    Renamed("bytes", "size_bytes"),
    Renamed("leaks", "duplicates"),
    Renamed("copies", "duplicates"),
    Renamed("told", "note"),
)
"""Keys of JSON output, and first words of MLflow's metrics: both are there for one release."""

_NEW_KEYS = {row.old: row.new for row in SETTINGS if "=" not in row.old}
_OLD_KEYS = {new: old for old, new in _NEW_KEYS.items()}
_VALUES = [(*row.old.split("="), row.new.partition("=")[2]) for row in SETTINGS if "=" in row.old]
_NEW_VALUES = {(key, old): new for key, old, new in _VALUES}
_OLD_VALUES = {(key, new): old for key, old, new in _VALUES}


class RenamedSettings(BaseModel):
    """A part of the configuration that may be given in the words of earlier releases."""

    PART: ClassVar[str] = ""
    """Its dotted key, by which the table knows its settings; empty for a complete configuration."""

    @model_validator(mode="before")
    @classmethod
    def _in_new_words(cls, values: Any) -> Any:
        return new_words(values, cls.PART) if isinstance(values, Mapping) else values

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, which takes names of `update` unchecked."""
        return super().model_copy(update=new_words(update or {}, self.PART), deep=deep)


def new_words(values: Mapping[str, Any], part: str = "") -> dict[str, Any]:
    """Nested settings of `part` in the words of this release.

    Raises:
        ValueError: a setting is given under its old and its new name, with different values.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        old = _joined(part, name)
        new = _NEW_KEYS.get(old, old)
        leaf = name if new == old else new.rpartition(".")[2]  # names of files are keys of a card, and have dots
        translated = new_words(value, new) if isinstance(value, Mapping) else _new_value(new, value)
        if leaf in found:
            is_old = old != new
            translated = _united(old=(found[leaf], translated)[is_old], new=(translated, found[leaf])[is_old], key=new)
        found[leaf] = translated
    return found


def old_words(values: Mapping[str, Any], part: str = "") -> dict[str, Any]:
    """Nested settings of `part` in the words that stored files and digests have: what `new_words` undoes."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        new = _joined(part, name)
        leaf = _OLD_KEYS[new].rpartition(".")[2] if new in _OLD_KEYS else name
        found[leaf] = old_words(value, new) if isinstance(value, Mapping) else _old_value(new, value)
    return found


def both_words(values: Mapping[str, Any], part: str = "") -> dict[str, Any]:
    """Nested settings of `part` in new words, with the old keys next to the new ones: for JSON output."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        new = _joined(part, name)
        found[name] = both_words(value, new) if isinstance(value, Mapping) else value
        if old := _OLD_KEYS.get(new):
            found[old.rpartition(".")[2]] = found[name]
    return found


def both_keys(output: Mapping[str, Any]) -> dict[str, Any]:
    """What a command prints as JSON: after each key that has a new name the same value under that name."""
    new = {row.old: row.new for row in OUTPUT}
    pairs = ((name, value) for key, value in output.items() for name, value in _both(key, new.get(key), value))
    return dict(pairs)


def _both(key: str, new: str | None, value: Any) -> Iterator[tuple[str, Any]]:
    yield key, value
    if new is not None:
        yield new, value


def stored_values(config: BaseModel) -> dict[str, Any]:
    """All settings as JSON values, in the words that stored files and digests have."""
    return old_words(config.model_dump(mode="json"), part_of(type(config)))


def part_of(kind: type[BaseModel]) -> str:
    """The dotted key of a configuration class; empty for a complete configuration."""
    return str(getattr(kind, "PART", ""))


def renamed(key: str, value: Any = None) -> tuple[str, Any]:
    """A dotted key and its value in the words of this release."""
    for old, new in _NEW_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key.removeprefix(old)
    if isinstance(value, Mapping):
        return key, new_words(value, key)
    return key, _new_value(key, value)


def row_of(key: str, value: Any = None) -> Renamed | None:
    """The row of the table that a dotted key, or its value, is an old word of; None where both are new."""
    for row in SETTINGS:
        old, _, old_value = row.old.partition("=")
        if old_value:
            matches = key == old and value == old_value
        else:
            matches = key == old or key.startswith(f"{old}.")
        if matches:
            return row
    return None


def rows_in(key: str, value: Any) -> Iterator[tuple[str, Any, Renamed]]:
    """Key, value and row of each old word in a setting that may hold others: `data.dicom` = {...}."""
    row = row_of(key, value if isinstance(value, str) else None)
    if row is not None:
        yield key, value, row
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from rows_in(f"{key}.{name}", inner)


def notice(row: Renamed, old: str, new: str) -> str:
    """The line that tells a user of an old word, as they wrote it and as they should."""
    return f"{old} is now {new}: {row.fate}"


def conflict(old: str, new: str) -> str:
    """The message where a setting is given twice with different values, as the user wrote both."""
    return f"{old} and {new} are one setting under its old and its new name, with different values: give only the new"


def _joined(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name


def _new_value(key: str, value: Any) -> Any:
    return _NEW_VALUES.get((key, value), value) if isinstance(value, str) else value


def _old_value(key: str, value: Any) -> Any:
    return _OLD_VALUES.get((key, value), value) if isinstance(value, str) else value


def _united(*, old: Any, new: Any, key: str) -> Any:
    """What is said of a setting under its old and its new name; ValueError where the two differ."""
    one, two = (_unwrapped(value) for value in (old, new))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        shared = {name: _united(old=one[name], new=two[name], key=f"{key}.{name}") for name in one if name in two}
        return {**one, **two, **shared}
    if _plain(one) != _plain(two):
        raise ValueError(conflict(f"{_old_key(key)} = {one!r}", f"{key} = {two!r}"))
    return new


def _unwrapped(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _old_key(key: str) -> str:
    for new, old in _OLD_KEYS.items():
        if key == new or key.startswith(f"{new}."):
            return old + key.removeprefix(new)
    return key


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
