"""The command shards duplicates: duplicate images as a table, as JSON, or as a page outside of the store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_shards.decode import UndecodableImage, decode
from data_shards.duplicates import REPORT, Copy, DuplicatesReport, Finding, named_labels, read_report
from data_shards.duplicates.page import EARLIER_PAGE, MOST_COPIES_SHOWN, PAGE, page
from data_shards.duplicates.scan import REFUSED
from data_shards.manifest import MANIFEST, open_dataset, read_classes
from data_shards.names import Places, samples
from data_shards.renamed import both_keys
from data_shards.shard import tar_key
from data_shards.store import Store
from pipelines.commands.shards.listing import check_target, place_text
from pipelines.commands.shards.owner import Owner, dataset_in, find_places, owners_config
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, Flag, JsonOption, StoreOption
from pipelines.console.terminal import console, table
from pipelines.wording import counted

SHOWN = 10  # groups in the terminal
_NO_PLACES = Places({}, None)


@dataclass(frozen=True)
class DuplicatesArguments(Owner, StoreOption, JsonOption):
    """Arguments of `shards duplicates`."""

    dataset: tyro.conf.Positional[str] = ""
    """DATASET or DATASET/NAME in the store, finished or rejected. Empty: the only one."""
    names: Flag = False
    """Look up the file names in the source."""
    page: str = ""
    """HTML file to write, with pictures and, with --names, file names; outside of the store and of the image set."""
    all: Flag = False
    """Print all listed groups, with all their images."""


def duplicates(asked: DuplicatesArguments) -> int:
    """Prints the duplicates of a dataset, or writes a page with them."""
    store = asked.open_store()
    out = dataset_in(store, asked.dataset, unfinished=True)
    finished = out.head(MANIFEST) is not None
    if not finished and out.head(REFUSED) is None:
        raise UsageError(
            f"{out.uri} is not finished, and was not rejected because of duplicates; finish it with `medmamba shard`"
        )
    report = _labelled(read_report(out, REPORT if finished else REFUSED), out, store)
    places = _NO_PLACES
    if asked.names or asked.page:
        config = owners_config(store, out, asked)
        check_target(asked.page, store, config, kind=".html")
        if asked.names or not finished:
            places = find_places(config, _keys(report, out, finished))
    if asked.page:
        _write_page(report, out, places, asked, finished)
    if asked.json:
        print(json.dumps(_as_json(report, out, places if asked.names else None, finished), indent=2))
        return 0
    _print(report, out, asked, places)
    return 0


def _labelled(report: DuplicatesReport, out: Store, store: Store) -> DuplicatesReport:
    """Adds class names to all images of the report: reports of earlier releases have labels only as numbers."""
    if all(copy.label_names or not copy.labels for finding in report.findings for copy in finding.copies):
        return report
    names = {copy.dataset for finding in report.findings for copy in finding.copies}
    classes = {name: read_classes(store.at("datasets", *name.split("/")) if name else out) for name in names}

    def labelled(finding: Finding) -> Finding:
        copies = [
            copy.model_copy(update={"label_names": named_labels(copy.labels, classes[copy.dataset])})
            for copy in finding.copies
        ]
        return finding.model_copy(update={"copies": tuple(copies)})

    return report.model_copy(update={"findings": tuple(labelled(finding) for finding in report.findings)})


def _keys(report: DuplicatesReport, out: Store, finished: bool) -> set[str]:
    if finished:
        return {each.key for each in samples(open_dataset(out), report)}
    return {copy.key for finding in report.findings for copy in finding.copies if not copy.dataset}


def _as_json(report: DuplicatesReport, out: Store, places: Places | None, finished: bool) -> dict[str, Any]:
    """The report as a JSON mapping, with the number of groups, and with files if `places` is given."""
    dumped = report.model_dump(mode="json")
    dumped["findings"] = [both_keys(finding) for finding in dumped["findings"]]
    for finding in dumped["findings"]:
        for copy in finding["copies"]:
            if places is not None and not copy["dataset"]:
                place = places.of.get(copy["key"])
                found = {"path": place.path, "frame": place.frame, "file": place.file} if place else {}
                copy |= {"path": None, "frame": None, "file": None, **found}
    state: dict[str, Any] = {"finished": finished, "groups": len(report.findings) + report.more}
    state["not_searched"] = report.not_searched
    if places is not None:
        missing = [key for key in report.dropped if key not in places.of]
        files = {key: places.of[key].file for key in report.dropped if key in places.of}
        state |= {"dropped_files": files, "without_file": _without_file(report, places) + len(missing)}
        state |= {"notes": list(places.notes)}
    return {**dumped, **state, "uri": out.uri}


def _without_file(report: DuplicatesReport, places: Places) -> int:
    keys = {copy.key for finding in report.findings for copy in finding.copies if not copy.dataset}
    return len((keys - set(report.dropped)) - places.of.keys())


def _print(report: DuplicatesReport, out: Store, asked: DuplicatesArguments, places: Places) -> None:
    table(
        "Duplicates",
        ("duplicates beyond the first", "images"),
        [(what, f"{count:,}") for what, count in report.counts.items()],
    )
    groups = len(report.findings) + report.more
    shown = report.findings if asked.all else report.findings[:SHOWN]
    if shown:
        columns = ("#", "group", "split", "label", "key", *(("file",) if asked.names else ()))
        rows = [row for i, finding in enumerate(shown, 1) for row in _rows(i, finding, asked, places)]
        table(f"{len(shown):,} of {counted(groups, 'group')}, the worst first", columns, rows)
    if len(shown) < len(report.findings):
        hidden = len(report.findings) - len(shown)
        console().print(f"and {counted(hidden, 'more group')}: --all prints all, --json has all", soft_wrap=True)
    if report.more:
        console().print(
            f"and {counted(report.more, 'more group')} that the report counts but does not list", soft_wrap=True
        )
    if asked.names and (missing := _without_file(report, places)):
        console().print(f"{counted(missing, 'image')} without a file in the source: removed or renamed")
    for note in places.notes:
        console().print(note, soft_wrap=True)
    console().print(report.not_searched, soft_wrap=True)
    where = asked.page or _page_in(out)
    console().print(
        f"policy {report.across}, {counted(len(report.dropped), 'image')} left out; pictures: {where}", soft_wrap=True
    )


def _page_in(out: Store) -> str:
    """Where the page of a dataset is, or how to get one."""
    name = next((name for name in (PAGE, EARLIER_PAGE) if out.head(name) is not None), "")
    return f"{out.uri}/{name}" if name else "--page FILE.html"


def _rows(number: int, finding: Finding, asked: DuplicatesArguments, places: Places) -> list[tuple[str, ...]]:
    """A row for each image of a group, and one with the number of images that are not shown."""
    copies = finding.copies if asked.all else finding.copies[:MOST_COPIES_SHOWN]
    head = f"{finding.head}, {finding.where}" + (", different labels" if finding.conflict else "")
    rows = []
    for i, copy in enumerate(copies):
        split = " ".join(filter(None, (copy.dataset, copy.split, "" if copy.fate == "kept" else copy.fate)))
        place = places.of.get(copy.key)
        file = "(another dataset)" if copy.dataset else place_text(place)
        cells = (split, ", ".join(copy.label_names), copy.key[:8], *((file,) if asked.names else ()))
        rows.append((str(number) if not i else "", head if not i else "", *cells))
    if rest := finding.rest(len(copies)):
        how = " (--all)" if len(copies) < len(finding.copies) else ""
        rows.append(("", f"{rest}{how}", "", "", "", *(("",) if asked.names else ())))
    return rows


def _write_page(
    report: DuplicatesReport, out: Store, places: Places, asked: DuplicatesArguments, finished: bool
) -> None:
    pictures = _Pictures(out if finished else None, places)

    def named(copy: Copy) -> str:
        place = places.of.get(copy.key)
        return place_text(place) if asked.names and not copy.dataset else ""

    most = {"most": len(report.findings)} if asked.all else {}
    title = "/".join(out.uri.rsplit("/", 2)[1:])
    html = page(report, title=title, classes=(), picture=pictures, named=named, **most)
    Path(asked.page).write_bytes(html.encode())


class _Pictures:
    """The pixels of an image: from its shard if it has one, else from the source."""

    def __init__(self, out: Store | None, places: Places):
        self._out, self._places = out, places
        self._at: dict[str, tuple[str, int, int]] = {}
        if out is not None:
            rows = open_dataset(out).table
            columns = (rows[name].to_pylist() for name in ("key", "shard", "offset", "size"))
            self._at = {key: (shard, offset, size) for key, shard, offset, size in zip(*columns, strict=True)}

    def __call__(self, copy: Copy) -> np.ndarray | None:
        place = self._places.of.get(copy.key)
        try:
            if copy.dataset:
                return None
            if self._out is not None and copy.key in self._at:
                shard, offset, size = self._at[copy.key]
                return decode(self._out.get(tar_key(shard), start=offset, length=size), examined=True)
            if place is not None and place.row is not None and self._places.image_set is not None:
                return decode(self._places.image_set.reader.read(place.row))
        except UndecodableImage:
            return None
        return None


DUPLICATES = Command(
    "shards duplicates",
    "Report duplicates: across splits, with different labels, in other datasets; --names adds file names.",
    DuplicatesArguments,
    duplicates,
)
