"""The class of all commands of `medmamba`, and the options that many of them share."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from data_shards.store import Store, StoreError, open_store
from data_shards.store.outage import PATIENCE_S
from pipelines.console.arguments import UsageError, parse

DEFAULT_STORE = "./medmamba-store"
Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class Command:
    """One command: `name` is what users write after `medmamba`, `help` its line in the list of commands.

    `run` gets the arguments that `read` makes of the command line and returns the exit code. `arguments` is their
    class, a frozen dataclass whose docstrings are the help of its options; `details` continues `help` in the
    command's own --help. `parts` imports the subcommands (`medmamba datasets fetch`).
    """

    name: str
    help: str
    arguments: Any
    run: Callable[[Any], int]
    details: str = ""
    read: Callable[[Command, Sequence[str]], Any] | None = None
    parts: Callable[[], Sequence[Command]] = tuple

    @property
    def description(self) -> str:
        """The text at the top of the command's own --help."""
        return f"{self.help}\n\n{self.details}" if self.details else self.help

    def __call__(self, argv: Sequence[str]) -> int:
        """Runs the command, or the subcommand that `argv` starts with; UsageError if `argv` is invalid."""
        part = next((part for part in self.parts() if argv[:1] == [part.name.rpartition(" ")[2]]), None)
        if part is not None:
            return part(argv[1:])
        return self.run((self.read or read_arguments)(self, argv))


def read_arguments(command: Command, argv: Sequence[str]) -> Any:
    """Parses the command's arguments into its dataclass; UsageError in one line, HelpShown after printing the help."""
    return parse(command.arguments, command.name, argv, description=command.description)


def read_words(command: Command, argv: Sequence[str]) -> list[str]:
    """Returns the words unparsed, for a command that parses them itself."""
    return list(argv)


def check_name(name: str, known: Collection[str]) -> None:
    """Raises UsageError for an unknown command, with the most similar one as a hint."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown command {name!r}; {hint}available: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class StoreOption:
    """Where runs, datasets and models are."""

    store: str = ""
    """Folder or s3://bucket/prefix. Empty: $MEDMAMBA_STORE, else ./medmamba-store."""

    def open_store(self) -> Store:
        """Opens the store; UsageError if its address is invalid, StoreError if it does not answer."""
        return open_named(self.store or default_store())


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    """How the result is printed."""

    json: Flag = False
    """Print the result as JSON on standard output."""


def default_store() -> str:
    """The store to use without --store; UsageError inside a Ray job, which must name one."""
    store = os.environ.get("MEDMAMBA_STORE")
    if not store and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UsageError(
            "no store given, and the folder of a Ray job is deleted when the job ends; "
            "give --store, or set MEDMAMBA_STORE before submitting"
        )
    return store or DEFAULT_STORE


def open_named(uri: str, *, patience_s: float = PATIENCE_S) -> Store:
    """Opens the store at `uri`; UsageError if the address is invalid, StoreError if nothing answers within 15 s."""
    try:
        store = open_store(uri, patience_s=patience_s)
    except StoreError as error:  # nothing was contacted yet: the address itself is invalid
        raise UsageError(f"--store: {error}") from None
    if store.is_local and (file := _file_above(Path(store.uri))):
        raise UsageError(
            f"--store {uri}: {file} is a file, but a store is a folder; give a folder or s3://BUCKET/PREFIX"
        )
    store.reach()  # once it has answered, steps wait longer for it
    return store


def _file_above(folder: Path) -> Path | None:
    """The nearest existing path at or above `folder`, if it is not a folder."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return None if there.is_dir() else there
