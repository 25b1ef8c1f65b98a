"""What a command of `medmamba` consists of, and the options that many of them share."""

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
    class, a frozen dataclass whose docstrings are the help of its options; `details` continues `help` where a command
    explains itself. `parts` loads the commands below this one (`medmamba datasets fetch`).
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
        """All of the text at the top of its own help."""
        return f"{self.help}\n\n{self.details}" if self.details else self.help

    def __call__(self, argv: Sequence[str]) -> int:
        """Runs it, or the part of it that `argv` names first; UsageError where `argv` cannot be meant."""
        part = next((part for part in self.parts() if argv[:1] == [part.name.rpartition(" ")[2]]), None)
        if part is not None:
            return part(argv[1:])
        return self.run((self.read or read_arguments)(self, argv))


def read_arguments(command: Command, argv: Sequence[str]) -> Any:
    """The command's arguments as its dataclass; UsageError in one line, HelpShown after printing the help."""
    return parse(command.arguments, command.name, argv, description=command.description)


def read_words(command: Command, argv: Sequence[str]) -> list[str]:
    """The command line as it is, for a command that reads it itself."""
    return list(argv)


def check_name(name: str, known: Collection[str]) -> None:
    """UsageError where there is no command of this name, with the one that it may be a slip of."""
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
        """The store that is named; UsageError where there can be none, StoreError where it does not answer."""
        return open_named(self.store or default_store())


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    """How the result is printed."""

    json: Flag = False
    """Print the result as JSON on standard output."""


def default_store() -> str:
    """The store where none is named on the command line. UsageError inside a Ray job, which must name one."""
    store = os.environ.get("MEDMAMBA_STORE")
    if not store and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UsageError(
            "this runs as a Ray job, whose folder is deleted with it, and no store is named; "
            "give --store, or set MEDMAMBA_STORE before submitting"
        )
    return store or DEFAULT_STORE


def open_named(uri: str, *, patience_s: float = PATIENCE_S) -> Store:
    """The store at `uri`; UsageError where there can be none, StoreError within 15 s where nobody answers."""
    try:
        store = open_store(uri, patience_s=patience_s)
    except StoreError as error:  # nothing was reached for yet: the address itself cannot be meant
        raise UsageError(f"--store: {error}") from None
    if store.is_local and (file := _file_above(Path(store.uri))):
        raise UsageError(
            f"--store {uri}: {file} is a file, and a store is a folder; name a folder or s3://BUCKET/PREFIX"
        )
    store.reach()  # once it has answered, a step waits for it with more patience
    return store


def _file_above(folder: Path) -> Path | None:
    """What is at the path, or above it, that is not a folder."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return None if there.is_dir() else there
