"""Samples with their files, as a table, as JSON, or as a CSV file outside of the store."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.config import DataConfig
from data_shards.names import Place, Places, Sample, with_labels
from data_shards.options import printable
from data_shards.store import Store
from pipelines.commands.shards.predicted import Predicted
from pipelines.console.arguments import UsageError
from pipelines.console.command import Flag, JsonOption, StoreOption
from pipelines.console.terminal import console, table
from pipelines.wording import counted

SHOWN = 20  # rows in the terminal
COLUMNS = ("key", "path", "frame", "split", "label", "state", "reason", "file")


@dataclass(frozen=True, kw_only=True)
class ListingOptions(StoreOption, JsonOption):
    """Where the rows are printed or written."""

    out: str = ""
    """CSV file to write, outside of the store and of the image set."""
    all: Flag = False
    """Print all rows."""


@dataclass(frozen=True)
class Listing:
    """Samples with their files, as a table, JSON or CSV."""

    store: Store
    out: Store
    samples: Sequence[Sample]
    places: Places | None
    """None if files were not asked for."""
    predicted: dict[str, Predicted]
    state_column: str = "state"
    """The column with the state of a sample; `reason` if all samples are quarantined."""

    def show(self, asked: ListingOptions, *, title: str, everything: bool, extra: dict[str, Any] | None = None) -> int:
        """Prints or writes the samples; returns the exit code."""
        rows = self._rows()
        if asked.out:
            self._write(rows, Path(asked.out))
        if asked.json:
            found = {"dataset": self._name(), **(extra or {}), **self._found(rows), "samples": rows}
            print(json.dumps(found, indent=2))
            return 0
        if not asked.out:
            self._print(rows, title, everything or asked.all)
        for line in self._notes(rows):
            console().print(line, soft_wrap=True)
        if asked.out:
            console().print(
                f"wrote {counted(len(rows), 'sample')} of {self.out.uri} to {asked.out}",
                soft_wrap=True,
            )
        return 0

    def _rows(self) -> list[dict[str, Any]]:
        of = self.places.of if self.places else {}
        image_set = self.places.image_set if self.places else None
        rows = [_row(with_labels(each, of.get(each.key), image_set), of.get(each.key)) for each in self.samples]
        if self.places is None:
            rows = [{key: row[key] for key in row if key not in ("path", "frame", "file")} for row in rows]
        rows.sort(key=lambda row: (not row.get("path"), row.get("path") or "", row.get("frame") or 0, row["key"]))
        if self.predicted:
            rows = [{**row, **self.predicted[row["key"]]._asdict()} for row in rows]
            rows.sort(key=lambda row: (row["correct"], -row["score"]))
        return rows

    def _found(self, rows: Sequence[dict]) -> dict[str, Any]:
        if self.places is None:
            return {}
        missing = sum(row["path"] is None for row in rows)
        return {"without_file": missing, "not_in_dataset": self.places.unlisted, "notes": list(self.places.notes)}

    def _notes(self, rows: Sequence[dict]) -> Iterable[str]:
        if self.places is None:
            return
        if missing := sum(row["path"] is None for row in rows):
            why = "removed or renamed" if missing < len(rows) else "is --source right?"
            yield f"{missing:,} of {counted(len(rows), 'sample')} without a file in the source: {why}"
        if self.places.unlisted:
            yield f"{counted(self.places.unlisted, 'image')} of the source not in the dataset: added later"
        yield from (printable(note) for note in self.places.notes)

    def _name(self) -> str:
        return "/".join(self.out.uri.rsplit("/", 2)[1:])

    def _print(self, rows: Sequence[dict], title: str, everything: bool) -> None:
        shown = rows if everything else rows[:SHOWN]
        columns = ["key", "split", "label"]
        # Predicted images are always in a shard, so their state is left out.
        columns += ["predicted", "score"] if self.predicted else [self.state_column]
        columns += ["file"] if self.places is not None else []
        if shown:
            table(f"{title} of {self._name()}", columns, [[_cell(row, name) for name in columns] for row in shown])
        if len(shown) < len(rows):
            more = "--all prints them, --json and --out FILE.csv have all" if self.places else "--all prints them"
            console().print(f"and {len(rows) - len(shown):,} more: {more}")

    def _write(self, rows: Sequence[dict], path: Path) -> None:
        columns = [*COLUMNS, *(Predicted._fields if self.predicted else ())]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            # Several labels are joined as in the table of an image set.
            writer.writerow({**row, "label": "|".join(row["label_names"])})
        # A name that is not UTF-8 keeps its bytes.
        path.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))


def _row(sample: Sample, place: Place | None) -> dict[str, Any]:
    return {
        "key": sample.key,
        "path": place.path if place else None,
        "frame": place.frame if place else None,
        "file": place.file if place else None,
        "split": sample.split,
        "label_names": list(sample.labels),
        "state": sample.state,
        "reason": sample.reason,
    }


def _cell(row: dict[str, Any], column: str) -> str:
    if column == "label":
        return ", ".join(row["label_names"])
    if column == "state":
        return row["state"] + (f": {printable(row['reason'])}" if row["reason"] else "")
    if column == "score":
        return f"{row['score']:.3f}"
    if column == "file":
        return _file_text(row["path"], row["frame"])
    return printable(str(row[column]))


def place_text(place: Place | None) -> str:
    """The file of a sample, for the terminal."""
    return _file_text(place.path, place.frame) if place else _file_text(None, None)


def _file_text(path: str | None, frame: int | None) -> str:
    if path is None:
        return "(not in the source)"
    return printable(path) + (f", frame {frame}" if frame else "")


def check_target(target: str, store: Store, config: DataConfig, *, kind: str) -> None:
    """UsageError if a file with names must not be written there: in the store or image set, or over another file."""
    if not target:
        return
    path = Path(target)
    real = path.absolute().parent.resolve() / path.name
    if path.suffix.lower() != kind or not real.parent.is_dir():
        raise UsageError(f"{target}: give a {kind} file in an existing folder")
    if store.is_local and real.is_relative_to(Path(store.uri).resolve()):
        raise UsageError(f"{target} is in the store, which must not contain file names; choose another folder")
    source = Path(config.source).expanduser().resolve() if config.source and "://" not in config.source else None
    if source is not None and real.is_relative_to(source if source.is_dir() else source.parent):
        raise UsageError(f"{target} is among the images and would become part of the image set; choose another folder")
    if path.exists() and not (path.is_file() and _OURS[kind] in path.read_bytes()[:4096]):
        raise UsageError(f"{target} exists and was not written by this command; choose another file")


_OURS = {".csv": ",".join(COLUMNS).encode(), ".html": b": duplicates</title>"}
