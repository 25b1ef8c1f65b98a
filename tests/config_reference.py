"""The reference of the configuration, from the config classes and their docstrings.

python tests/config_reference.py        writes pipelines/CONFIG.md (`make reference`)
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.placement import PlacementConfig
from pipelines.recipes import Recipe

PAGE = Path(__file__).resolve().parents[1] / "pipelines" / "CONFIG.md"
INTRODUCTION = """\
# Configuration

Every key of a recipe and of the placement, with its type, its default and its meaning. `make reference` writes this
page from the configuration classes; a test checks that it is current. On the command line a key is an option:
`train.optim.weight_decay` is `--train.optim.weight-decay`. Several values are separated by spaces, and a switch is
turned off by `no-` (`--gate.no-beats-baseline`). The defaults are those of a recipe without settings; each recipe
overrides some of them, which `medmamba run --recipe NAME --dry-run` prints.

Keys of the placement may change from one command of a run to the next. The others say what a run makes: to change
one, give the run another name.
"""


class Key(NamedTuple):
    """A key of the configuration as the reference shows it."""

    key: str
    type: str
    default: str
    meaning: str


class Section(NamedTuple):
    """The keys of one configuration class."""

    prefix: str
    meaning: str
    keys: list[Key]


def sections() -> list[Section]:
    """All configuration classes with their keys, in the order of the recipe, the placement last."""
    found = []
    for name, field in Recipe.model_fields.items():
        found += _sections(name, field.annotation, _default(field))
    return [*found, *_sections("placement", PlacementConfig, PlacementConfig())]


def fields() -> list[Key]:
    """All keys."""
    return [key for section in sections() for key in section.keys]


def _sections(prefix: str, annotation: Any, default: Any) -> Iterator[Section]:
    for kind in _models(annotation):
        values = default if isinstance(default, kind) else kind()
        nested = {name: field for name, field in kind.model_fields.items() if _models(field.annotation)}
        keys = [
            Key(f"{prefix}.{name}", _type(field), _shown(getattr(values, name)), _line(field.description or ""))
            for name, field in kind.model_fields.items()
            if name not in nested
        ]
        yield Section(prefix, _line(kind.__doc__ or ""), keys)
        for name, field in nested.items():
            yield from _sections(f"{prefix}.{name}", field.annotation, getattr(values, name))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [kind for part in get_args(annotation) for kind in _models(part)]
    return []


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _type(field: FieldInfo) -> str:
    bounds = _bounds(field.metadata)
    return _named(field.annotation) + (f", {bounds}" if bounds else "")


def _named(annotation: Any) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) is Annotated:
        # pydantic keeps the limits of elements as a FieldInfo or as its parts
        limits = [part for each in arguments[1:] for part in getattr(each, "metadata", [each])]
        return _named(arguments[0]) + (f" {bounds}" if (bounds := _bounds(limits)) else "")
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_named(part) for part in arguments)
    if get_origin(annotation) is tuple:
        if arguments[-1] is Ellipsis:
            return f"any number of {_named(arguments[0])}"
        return f"{len(arguments)} x {_named(arguments[0])}"
    return {type(None): "none", bool: "switch", str: "text", int: "integer", float: "number"}[annotation]


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return ", ".join(
        f"{sign} {limit:g}"
        for part in metadata
        for name, sign in signs.items()
        if (limit := getattr(part, name, None)) is not None
    )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "`" + " ".join(map(str, value)) + "`" if value else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "none"
    return f"`{json.dumps(value) if isinstance(value, str) and not value else value}`"


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def text() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for prefix, meaning, keys in sections():
        kind = next((key.type for key in keys if key.key == f"{prefix}.kind"), "")
        parts.append(f"\n## `{prefix}`{f', kind {kind}' if kind else ''}\n\n{meaning}\n")
        parts.append("| key | type | default | meaning |\n| --- | --- | --- | --- |")
        parts += ["| " + " | ".join(_cell(each) for each in (f"`{key.key}`", *key[1:])) + " |" for key in keys]
    return "\n".join(parts) + "\n"


def _cell(value: str) -> str:
    """Text for a cell of a table, in which a bar ends the cell and <word> outside of backticks is taken for HTML."""
    parts = value.replace("|", r"\|").split("`")
    return "`".join(part.replace("<", "&lt;") if at % 2 == 0 else part for at, part in enumerate(parts))


if __name__ == "__main__":
    PAGE.write_text(text())
