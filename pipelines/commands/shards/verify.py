"""The command shards verify: compares every byte of a dataset with its manifest, in Ray tasks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import tyro

from data_shards.manifest import MAKE_AGAIN, MANIFEST
from data_shards.renamed import both_keys
from data_shards.verify import verify as verify_dataset
from pipelines.cluster import ray_session
from pipelines.commands.shards.owner import dataset_in
from pipelines.console.command import Command, JsonOption, StoreOption
from pipelines.console.terminal import Terminal, console
from pipelines.steps.shard import ray_map
from pipelines.wording import counted


@dataclass(frozen=True)
class VerifyArguments(StoreOption, JsonOption):
    """Arguments of `shards verify`."""

    dataset: tyro.conf.Positional[str] = ""
    """DATASET or DATASET/NAME in the store. Empty: the only one."""


def verify(asked: VerifyArguments) -> int:
    """Prints what differs; exit code 1 if something does."""
    out = dataset_in(asked.open_store(), asked.dataset)
    terminal = Terminal()
    terminal.say("connecting to Ray")
    ray_session.connect()

    def progress(done: int, total: int, unit: str) -> None:
        terminal.progress("verify", {"done": done, "total": total, "unit": unit})

    try:
        found = verify_dataset(out, run_tasks=ray_map, progress=progress)
    finally:
        terminal.close()
    if asked.json:
        print(json.dumps(both_keys(asdict(found)), indent=2))
        return 1 if found.problems else 0
    for problem in found.problems:
        console().print(f"wrong: {problem}")
    for stray in found.strays:
        console().print(f"not part of the dataset (unused, can be deleted): {stray}")
    verdict = counted(len(found.problems), "problem") if found.problems else "matches the manifest"
    console().print(
        f"{out.uri}: {counted(found.shards, 'shard')}, {counted(found.samples, 'sample')}, "
        f"{found.bytes / 1e6:,.0f} MB read: {verdict}"
    )
    if found.shards and found.problems:
        console().print(f"To fix it, delete the shards named above and {MANIFEST}, {MAKE_AGAIN}.")
    return 1 if found.problems else 0


VERIFY = Command(
    "shards verify",
    "Read every byte of a dataset and compare it with its manifest; exit code 1 if something is wrong.",
    VerifyArguments,
    verify,
)
