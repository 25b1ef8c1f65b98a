"""The command submit: runs any other command as a job on a Ray cluster."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import tyro

from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, check_name, read_arguments


@dataclass(frozen=True)
class SubmitArguments:
    """Arguments of `submit` before the `--`; `command` holds the words after it."""

    address: str = ""
    """Address of the cluster's dashboard, http://HOST:8265. Empty: $RAY_API_SERVER_ADDRESS."""
    wait: bool = True
    """Follow the log until the job ends; --no-wait prints its id and returns."""
    command: tyro.conf.Suppress[tuple[str, ...]] = ()


def submit(asked: SubmitArguments) -> int:
    """Submits the command; returns the job's exit code, or 0 at once without `wait`."""
    address = asked.address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise UsageError(
            f"submit: {f'--address {address} is not the address' if address else 'no address'} of a Ray dashboard; "
            "give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS"
        )
    from pipelines.cluster.job import submit as submit_job

    return submit_job(address, list(asked.command), wait=asked.wait)


def submit_command(others: Callable[[], Collection[str]]) -> Command:
    """The command submit, which accepts only the commands `others()`."""
    return Command(
        "submit",
        "Run any of these commands as a job on a Ray cluster.",
        SubmitArguments,
        submit,
        "Example: `medmamba submit --address URL -- run release --recipe quickstart`. Sends the three "
        "packages and the variables with endpoints and addresses, never keys. Follows the job's log and returns its "
        "exit code.",
        read=functools.partial(_read, others=others),
    )


def _read(command: Command, argv: Sequence[str], *, others: Callable[[], Collection[str]]) -> SubmitArguments:
    """The options before the `--`, and the command after it; UsageError if the command is missing or unknown."""
    own, dashes, words = _split_at_dashes(argv)
    nothing = UsageError("submit: nothing to run; put the command after --, as in `medmamba submit -- run release`")
    if not dashes and set(own) & set(others()):
        raise nothing
    asked = read_arguments(command, own)
    words = words[1:] if words[:1] == ["medmamba"] else words
    if not words:
        raise nothing
    check_name(words[0], others())  # the cluster would only reject it minutes later
    return replace(asked, command=tuple(words))


def _split_at_dashes(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    argv = list(argv)
    if "--" not in argv:
        return argv, "", []
    at = argv.index("--")
    return argv[:at], "--", argv[at + 1 :]
