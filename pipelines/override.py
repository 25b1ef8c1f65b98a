"""The only way to change a configuration: validated, full dotted keys (`train.optim.lr`)."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from data_shards.renamed import conflict, notice, part_of, renamed, rows_in

Config = TypeVar("Config", bound=BaseModel)
_log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A configuration that cannot be: unknown key, value out of range, fields that contradict each other."""


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns `config` with the fields named by dotted keys replaced, validated as a whole.

    A key or value of an earlier release is taken for the new one, with a warning in the log.

    Raises ConfigError naming the key, the value and the rule it breaks; nothing is changed partly.
    """
    values = config.model_dump()
    known = flatten(values)
    for key, value in _in_new_words(changes, part_of(type(config))).items():
        *parents, leaf = key.split(".")
        place: Any = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or leaf not in place:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"known keys begin with {', '.join(values)}"
            raise ConfigError(f"{key} is not a field of {type(config).__name__}: {hint}")
        place[leaf] = value
    return validated(type(config), values)


def _in_new_words(changes: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The changes of `part` in the words of this release; each old word is logged.

    Raises ConfigError where a setting is given under its old and its new name, with different values.
    """
    found: dict[str, Any] = {}
    written: dict[str, str] = {}
    prefix = f"{part}." if part else ""
    for old, value in changes.items():
        try:
            name, translated = renamed(prefix + old, value)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        new = name.removeprefix(prefix)
        for key, inner, row in rows_in(prefix + old, value):
            now, current = renamed(key, inner)
            written_as = f"{key.removeprefix(prefix)} = {_plain(inner)}"
            _log.warning("%s", notice(row, written_as, f"{now.removeprefix(prefix)} = {_plain(current)}"))
        if new in found and found[new] != translated:
            before, after = sorted((written[new], old), key=lambda key: key == new)
            raise ConfigError(conflict(*(f"{key} = {_plain(changes[key])}" for key in (before, after))))
        found[new], written[new] = translated, old
    return found


def validated(kind: type[Config], values: Mapping[str, Any], *, prefix: str = "") -> Config:
    """Returns `kind(**values)`; raises ConfigError with one clause per broken rule instead of pydantic's pages.

    `prefix` is what users write before the keys of this kind.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, values, prefix=prefix)) from None


def explain(error: ValidationError, values: Mapping[str, Any] | None = None, *, prefix: str = "") -> str:
    """One clause per broken rule: dotted key = value: rule. `values` is what was validated."""
    clauses = []
    for fault in error.errors(include_url=False):
        where = fault["loc"] if values is None else _as_written(fault["loc"], fault["type"], values)
        key = ".".join(map(str, (prefix, *where) if prefix else where))
        rule = fault["msg"].removeprefix("Value error, ")
        value = "" if isinstance(fault["input"], Mapping) or not key else f" = {_plain(fault['input'])}"
        clauses.append(f"{key}{value}: {rule}" if key else rule)
    return "; ".join(clauses)


def _as_written(loc: tuple[int | str, ...], kind: str, values: Mapping[str, Any]) -> list[int | str]:
    """`loc` without what pydantic adds to a key: the tag of the model it chose (model.medmamba.drop_path)."""
    place: Any = values
    kept = []
    for position, part in enumerate(loc):
        absent = kind == "missing" and position == len(loc) - 1
        if isinstance(place, Mapping) and part not in place and not absent:
            continue
        kept.append(part)
        place = place.get(part) if isinstance(place, Mapping) else None
    return kept


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else repr(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level of dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every leaf that differs; an absent leaf counts as None."""
    flat_old, flat_new = flatten(old), flatten(new)
    keys = sorted(flat_old.keys() | flat_new.keys())
    return {key: (flat_old.get(key), flat_new.get(key)) for key in keys if flat_old.get(key) != flat_new.get(key)}
