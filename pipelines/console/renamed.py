"""Old words on a command line: they work for one release, and each is reported in a line."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_shards.renamed import COMMANDS, Renamed, conflict, notice, renamed, row_of
from pipelines.console.arguments import UsageError
from pipelines.console.terminal import visible


@dataclass(frozen=True)
class _Option:
    """An option with its values, as the user wrote it."""

    words: tuple[str, ...]

    @property
    def _parts(self) -> tuple[str, str, str]:
        return self.words[0].partition("=")

    @property
    def key(self) -> str:
        """`--data.max-side=8` -> `data.max_side`."""
        return self._parts[0].removeprefix("--").replace("-", "_")

    @property
    def values(self) -> tuple[str, ...]:
        """What follows it, behind an equals sign or as words of their own."""
        _, equals, value = self._parts
        return (value, *self.words[1:]) if equals else self.words[1:]

    @property
    def row(self) -> Renamed | None:
        """The row of the table that it is an old word of."""
        return row_of(self.key, self.values[0] if self.values else None)

    def in_new_words(self) -> _Option:
        """The same option in the words of this release."""
        key, _ = renamed(self.key)
        flag = self._parts[0] if key == self.key else f"--{key.replace('_', '-')}"
        values = tuple(renamed(self.key, value)[1] for value in self.values)
        return _Option((f"{flag}={values[0]}", *values[1:]) if self._parts[1] else (flag, *values))

    def __str__(self) -> str:
        return " ".join(self.words[: 1 if self._parts[1] else 2])  # no renamed setting takes several values


def in_new_words(argv: Sequence[str]) -> list[str]:
    """The command line in the words of this release; a line on standard error for each old word.

    What follows `--` belongs to another command and stays as it is. UsageError where a setting is given under its old
    and its new name, with different values.
    """
    command, own, rest = _parts(argv)
    given = [*_options(own)]
    options: list[_Option] = []
    notices = dict.fromkeys(_command_notices(command))
    for option in given:
        new, row = option.in_new_words(), option.row
        options.append(new)
        if row is None:
            continue
        notices[notice(row, str(option), str(new))] = None
        _refuse_conflict(option, new, given)
    for line in notices:
        print(f"medmamba: {visible(line)}", file=sys.stderr, flush=True)
    return [*_new_command(command), *(word for option in options for word in option.words), *rest]


def _refuse_conflict(old: _Option, new: _Option, given: Sequence[_Option]) -> None:
    for other in given:
        if other.key == new.key != old.key and other.in_new_words().values[:1] != new.values[:1]:
            raise UsageError(conflict(str(old), str(other)))


def _parts(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The words before the first option, the options, and what follows `--`."""
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    own = list(itertools.takewhile(lambda word: word != "--", argv[len(words) :]))
    return words, own, list(argv[len(words) + len(own) :])


def _options(words: Sequence[str]) -> Iterator[_Option]:
    """Each option with the words up to the next one."""
    starts = [at for at, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        yield _Option(tuple(words[start:end]))


def _new_command(words: Sequence[str]) -> list[str]:
    for row in COMMANDS:
        old = row.old.split()
        if list(words[: len(old)]) == old:
            return [*row.new.split(), *words[len(old) :]]
    return list(words)


def _command_notices(words: Sequence[str]) -> Iterator[str]:
    for row in COMMANDS:
        if list(words[: len(row.old.split())]) == row.old.split():
            yield notice(row, f"medmamba {row.old}", f"medmamba {row.new}")
