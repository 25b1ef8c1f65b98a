"""Tab completion: a script for the user's shell, made by tyro from the arguments of all commands."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import tyro

from pipelines.console.arguments import UsageError, unchecked
from pipelines.console.command import Command
from pipelines.placement import PlacementConfig
from pipelines.recipes import Recipe

SHELLS = ("bash", "zsh", "fish")  # tyro needs another package for tcsh


def print_completion(commands: Iterable[Command], argv: Sequence[str]) -> int:
    """Prints the script for the shell that `argv` names; returns the exit code."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UsageError(f"--print-completion {' '.join(argv)}: name one shell: {', '.join(SHELLS)}")
    kind, script = _one_of(commands), ["--tyro-write-completion", argv[0], "-"]
    with contextlib.suppress(SystemExit):  # tyro's way to end once it has printed the script
        tyro.cli(kind, prog="medmamba", args=script, config=(tyro.conf.SuppressFixed,))
    return 0


def _one_of(commands: Iterable[Command]) -> Any:
    """The type of which each kind is a command with what it takes."""
    return functools.reduce(operator.or_, (Annotated[_kind(each), _named(each)] for each in commands))


def _named(command: Command) -> Any:
    return tyro.conf.subcommand(name=command.name.rpartition(" ")[2], description=command.help, prefix_name=False)


def _kind(command: Command) -> Any:
    """The arguments of a command; of one that is a choice between others only that choice."""
    parts = command.parts()
    fields: list[Any] = []
    if parts:
        fields.append(("part", _one_of(parts)))
    if parts or not dataclasses.is_dataclass(command.arguments):
        return dataclasses.make_dataclass("Words", fields, frozen=True)
    kind: Any = command.arguments
    if getattr(kind, "__parameters__", ()):  # filled with the values of a recipe
        shown, where = unchecked(Recipe()), unchecked(PlacementConfig())
        return kind[type(shown), type(where)]
    return kind
