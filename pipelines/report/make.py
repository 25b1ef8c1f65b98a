"""Makes the documents of a run: its page and its model card."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from data_shards.store import Store
from pipelines.report.card import card, to_json, to_markdown
from pipelines.report.described import verdict
from pipelines.report.examples import examples
from pipelines.report.page import render
from pipelines.report.records import RunRecords, read_run
from pipelines.report.sections import sections
from pipelines.report.words import plain

PAGE, MARKDOWN, JSON = "report.html", "card.md", "card.json"
IMAGES = 12
"""Images on a page unless another number is asked for."""


@dataclass(frozen=True)
class Report:
    """The documents of a run."""

    files: dict[str, bytes]
    """Name -> content: the page, the card as Markdown and as JSON."""
    card: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of the files."""
        digest = hashlib.sha256()
        for name, data in sorted(self.files.items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()

    def write(self, out: Store) -> None:
        """Stores the files in `out`."""
        for name, data in self.files.items():
            out.put(name, data)


def make_report(store: Store, run: str, *, images: int = IMAGES) -> Report:
    """The documents of a run that has been evaluated.

    Raises ValueError where a step that the report needs has not finished, or its files were changed afterwards.
    """
    return report_of(read_run(store, run), images=images)


def report_of(records: RunRecords, *, images: int = 0) -> Report:
    """The documents of a run whose records were read; `images` of the test split are shown with maps."""
    shown, reason = examples(records, images)
    page = render(
        "page.html",
        title=f"{plain(records.run)}: evaluation",
        lead=verdict(records),
        sections=sections(records, shown, reason),
        made_from=f"run {plain(records.run)}",
    )
    found = card(records)
    return Report({PAGE: page, MARKDOWN: to_markdown(records), JSON: to_json(found)}, found)
