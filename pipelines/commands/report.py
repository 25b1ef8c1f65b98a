"""The command report: a run's evaluation as one HTML page, or a page that compares runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_shards.store import Store
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, JsonOption, StoreOption
from pipelines.console.terminal import console


@dataclass(frozen=True)
class ReportArguments(StoreOption, JsonOption):
    """What `report` takes."""

    run: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="RUN")] = ()
    """Run to report on; given several times: the runs to compare, with the first."""
    out: str = ""
    """HTML file to write; an existing one is replaced. Empty: below runs/RUN/report in the store."""
    images: int = 12
    """Most images to show with the network's maps, up to 50. 0: none, which needs neither shards nor weights."""


def report(asked: ReportArguments) -> int:
    """Writes the page and prints its place; with --json the model card of each run."""
    if not asked.run:
        raise UsageError("report: name a run with --run; `medmamba status` lists the runs there are")
    if repeated := next((name for name in asked.run if asked.run.count(name) > 1), ""):
        raise UsageError(f"report: --run {repeated} is given twice; give different runs to compare")
    if not 0 <= asked.images <= 50:
        raise UsageError(f"report: --images {asked.images} must be from 0 to 50")
    if asked.out and Path(asked.out).is_dir():
        raise UsageError(f"--out {asked.out} is a folder: name a file in it")
    store = asked.open_store()
    if len(asked.run) == 1:
        return _one(asked, store)
    from pipelines.report.card import card
    from pipelines.report.comparison import make_comparison
    from pipelines.report.records import read_run

    runs = [read_run(store, name) for name in asked.run]
    name = hashlib.sha256("\0".join(asked.run[1:]).encode()).hexdigest()[:12]
    place = _written(asked, store, f"comparison-{name}.html", make_comparison(runs))
    _tell(asked, place, [card(run) for run in runs])
    return 0


def _one(asked: ReportArguments, store: Store) -> int:
    from pipelines.report.make import PAGE, make_report

    found = make_report(store, asked.run[0], images=asked.images)
    if asked.out:
        place = _written(asked, store, PAGE, found.files[PAGE])
    else:
        out = store.at("runs", asked.run[0], "report")
        found.write(out)
        place = f"{out.uri}/{PAGE}"
    _tell(asked, place, found.card)
    return 0


def _written(asked: ReportArguments, store: Store, name: str, page: bytes) -> str:
    if asked.out:
        Path(asked.out).write_bytes(page)
        return asked.out
    out = store.at("runs", asked.run[0], "report")
    out.put(name, page)
    return f"{out.uri}/{name}"


def _tell(asked: ReportArguments, place: str, card: object) -> None:
    if asked.json:
        print(json.dumps(card, indent=2, ensure_ascii=False))
    else:
        console().print(place, soft_wrap=True)


REPORT = Command(
    "report",
    "Write the evaluation of a run as an HTML page, or compare runs.",
    ReportArguments,
    report,
    "The page needs no other file and no network. Next to it, the model card is written as card.md and card.json. With "
    "several runs the page has their figures side by side, and paired differences where they share a dataset.",
)
