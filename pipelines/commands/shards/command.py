"""The command shards. Its subcommands are imported only when they are needed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, read_words
from pipelines.console.terminal import console


def shards(argv: list[str]) -> int:
    """Lists the subcommands of `shards`; UsageError if `argv` names an unknown one."""
    parts = {part.name.rpartition(" ")[2]: part for part in _parts()}
    if argv and argv[0] not in ("-h", "--help"):
        raise UsageError(f"shards: unknown command {argv[0]!r}; available: {', '.join(parts)}")
    console().print(f"usage: medmamba shards {{{','.join(parts)}}}")
    console().print("           [DATASET[/NAME]] [--store STORE] [--help]\n")
    for name, part in parts.items():
        for i, line in enumerate(textwrap.wrap(part.help, 66)):
            console().print(f"  {'' if i else name:<11} {line}")
    return 0


def _parts() -> Sequence[Command]:
    from pipelines.commands.shards.duplicates import DUPLICATES
    from pipelines.commands.shards.names import NAMES
    from pipelines.commands.shards.quarantine import QUARANTINE
    from pipelines.commands.shards.show import SHOW
    from pipelines.commands.shards.verify import VERIFY

    return VERIFY, SHOW, DUPLICATES, QUARANTINE, NAMES


SHARDS = Command(
    "shards",
    "Inspect a dataset: verify, show, duplicates, quarantine, file names.",
    list[str],
    shards,
    read=read_words,
    parts=_parts,
)
