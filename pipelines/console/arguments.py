"""Parses command lines with tyro, over types with a recipe's values as defaults; mistakes are one-line UsageErrors."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Model = TypeVar("Model", bound=BaseModel)

OPTIONS = (tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
FRAME = "─│╭╮╰╯"  # tyro's frame around an error on a terminal; elsewhere it prints lines of "-"
UNKNOWN = "Unrecognized options: "


class UsageError(ValueError):
    """The command line is invalid."""


class HelpShown(Exception):  # noqa: N818  (not an error)
    """The help text that was asked for has been printed; nothing is left to do."""


def parse(kind: Any, verb: str, argv: Sequence[str], **options: Any) -> Any:
    """Parses `argv` into `kind`; raises UsageError in one line, HelpShown after printing a help text."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, prog=f"medmamba {verb}", args=list(argv), config=OPTIONS, **options)
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise HelpShown from None
        fault = _in_one_line(printed.getvalue())
        hint = _suggestion(fault.removeprefix(UNKNOWN).split(", "), options) if fault.startswith(UNKNOWN) else ""
        raise UsageError(f"{verb}: {fault}; {hint or f'see medmamba {verb} --help'}") from None


def peek(argv: Sequence[str], name: str) -> str:
    """The last value of `--name` as tyro will see it; needed first, because it decides the other defaults."""
    found = ""
    for position, argument in enumerate(argv):
        if argument == f"--{name}" and position + 1 < len(argv):
            found = argv[position + 1]
        elif argument.startswith(f"--{name}="):
            found = argument.split("=", 1)[1]
    return found


def unchecked(model: BaseModel, kinds: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A dataclass with the fields, values and help texts of `model`, nested ones too, but without validation.

    The command line fills it, and `override` validates the complete recipe once. Within tyro each part would be
    validated separately, and users would see pages of pydantic's errors. `kinds` replaces the types of some fields.
    """
    fields = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        kind: Any = kinds.get(name, info.annotation)
        if isinstance(value, BaseModel):
            # One of several models: accept the tag of any of them (see `of_kind`).
            tags = {str(info.discriminator): Literal[tuple(_models(info))]} if info.discriminator else {}
            value = unchecked(value, tags)
            kind = type(value)
        fields.append((name, Annotated[kind, tyro.conf.arg(help=info.description)], field(default=value)))
    return make_dataclass(type(model).__name__, fields, frozen=True)()


def of_kind(config: Model, argv: Sequence[str]) -> Model:
    """`config` with each part that is one of several models (`model.kind`) replaced by the one that `argv` names."""
    for name, info in type(config).model_fields.items():
        wanted = peek(argv, f"{name}.{info.discriminator}") if info.discriminator else ""
        if not wanted:
            continue
        models = _models(info)
        if wanted not in models:
            raise UsageError(f"--{name}.{info.discriminator} {wanted}: unknown value; available: {', '.join(models)}")
        if not isinstance(getattr(config, name), models[wanted]):
            config = config.model_copy(update={name: models[wanted]()})
    return config


def _models(info: FieldInfo) -> dict[str, type[BaseModel]]:
    """Tag -> model, for a field that holds one of several models."""
    return {kind.model_fields[str(info.discriminator)].default: kind for kind in get_args(info.annotation)}


def _flags(parsed: Any, prefix: str = "") -> list[str]:
    """The options for nested dataclasses, as users write them."""
    found: list[str] = []
    for name, value in vars(parsed).items():
        # tyro's `name=""` lifts the fields of `values` one level up.
        path = "" if name == "values" else f"{prefix}{name.replace('_', '-')}"
        found += _flags(value, f"{path}." if path else "") if hasattr(value, "__dict__") else [f"--{path}"]
    return found


def _suggestion(unknown: Sequence[str], options: Mapping[str, Any]) -> str:
    known = _flags(options["default"]) if "default" in options else []
    for argument in unknown:
        flag = argument.split("=", 1)[0].replace("_", "-")
        others = [each for each in known if each != flag]
        # A field without its prefix: --lr for --train.optim.lr.
        near = [each for each in others if each.rpartition(".")[2] == flag.lstrip("-")]
        near = near or (difflib.get_close_matches(flag, others, n=3, cutoff=0.7) if flag.startswith("-") else [])
        if near:
            return f"did you mean {', '.join(near)}?"
    return ""


def _in_one_line(box: str) -> str:
    """The first section of tyro's framed message, without frame, title, colors and line breaks."""
    lines = [line.strip(f" {FRAME}") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    title, *body = [line for line in lines if line] or [""]
    section = itertools.takewhile(lambda line: line.strip("-"), body[1:] if body and not body[0].strip("-") else body)
    return " ".join(" ".join(section).split()).removesuffix(".") or title
