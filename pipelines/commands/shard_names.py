"""`medmamba shards names` and `shards quarantine`: from the keys of a dataset to the files of its owner.

Names are found in the source, on this machine, and written to the terminal or to a file outside of the store.
"""

from __future__ import annotations

import csv
import io
import json as json_
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_shards.config import DataConfig
from data_shards.leakage import read_report
from data_shards.manifest import MANIFEST, open_dataset
from data_shards.names import (
    Place,
    Places,
    Sample,
    find,
    quarantined,
    quarantined_so_far,
    samples,
    with_labels,
)
from data_shards.options import printable
from data_shards.settings import SETTINGS, salt_digest, settings_on_record
from data_shards.store import Store, StoreKeyError
from pipelines.commands.arguments import UsageError, parse
from pipelines.commands.predicted import Predicted, read_predicted
from pipelines.commands.terminal import console, table

Flag = tyro.conf.FlagCreatePairsOff[bool]
OpenStore = Callable[[str], Store]
SHOWN = 20  # rows in the terminal
_KEY = set("0123456789abcdef")
COLUMNS = ("key", "path", "frame", "split", "label", "state", "reason", "file")


@dataclass(frozen=True)
class Owner:
    """Where the images are, for those who have them."""

    source: str = ""
    """Where the image set is now; empty: where it was when the dataset was made."""
    salt: str = ""
    """The dataset's --data.salt; empty: as a run in this store has it on record."""


@dataclass(frozen=True)
class NamesArguments(Owner):
    """What `shards names` takes."""

    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[DATASET[/NAME]] [KEY ...]")] = ()
    """DATASET or DATASET/NAME (none: the only one there), then keys, or beginnings of keys (none: all)."""
    keys: tuple[str, ...] = ()
    """Keys or beginnings of keys, where the first word could be taken for a dataset."""
    predictions: str = ""
    """Name of a run: only its test images, with the class it predicts, the wrong ones first."""
    out: str = ""
    """CSV file to write, outside of the store and of the image set."""
    store: str = ""
    """Folder or s3://bucket/prefix; empty: $MEDMAMBA_STORE, else ./medmamba-store."""
    all: Flag = False
    """Print all rows, however many."""
    json: Flag = False
    """Print JSON."""


@dataclass(frozen=True)
class QuarantineArguments(Owner):
    """What `shards quarantine` takes."""

    dataset: tyro.conf.Positional[str] = ""
    """DATASET or DATASET/NAME, as under datasets/ in the store, finished or not; empty: the only one there."""
    names: Flag = False
    """Find the files in the source."""
    out: str = ""
    """CSV file to write, outside of the store and of the image set."""
    store: str = ""
    """Folder or s3://bucket/prefix; empty: $MEDMAMBA_STORE, else ./medmamba-store."""
    all: Flag = False
    """Print all rows, however many."""
    json: Flag = False
    """Print JSON."""


def names(argv: Sequence[str], open_at: OpenStore) -> int:
    """Find the files of keys: path, frame, split, label and state of every sample."""
    asked = parse(NamesArguments, "shards names", argv, description=names.__doc__)
    store = open_at(asked.store)
    name, prefixes = _dataset_and_keys(store, asked)
    out = dataset_in(store, name)
    dataset = open_dataset(out)
    known = samples(dataset, read_report(out))
    config = owners_config(store, out, asked)
    check_target(asked.out, store, config, kind=".csv")
    places = find_places(config, {each.key for each in known})
    predicted = read_predicted(store, asked.predictions, dataset) if asked.predictions else {}
    chosen = [each for each in known if not predicted or each.key in predicted]
    chosen = _matching(chosen, prefixes, out)
    listing = _Listing(store, out, chosen, places, predicted)
    return listing.show(asked, title="Samples", everything=bool(prefixes))


def quarantine(argv: Sequence[str], open_at: OpenStore) -> int:
    """List the images that could not be decoded, with reasons, also of a refused conversion."""
    asked = parse(QuarantineArguments, "shards quarantine", argv, description=quarantine.__doc__)
    store = open_at(asked.store)
    out = dataset_in(store, asked.dataset, unfinished=True)
    finished = out.head(MANIFEST) is not None
    if finished:
        dataset = open_dataset(out)
        bad, num = quarantined(dataset), len(dataset.table) + len(dataset.manifest.quarantine)
    else:
        bad, num = quarantined_so_far(out)
    places = None
    if asked.names:
        config = owners_config(store, out, asked)
        check_target(asked.out, store, config, kind=".csv")
        places = find_places(
            config,
            {each.key for each in samples(dataset, read_report(out))} if finished else {each.key for each in bad},
        )
        places = places if finished else replace(places, unlisted=None)
    elif asked.out:
        raise UsageError("shards quarantine: --out writes the files' names: give --names with it")
    reasons = Counter(each.reason for each in bad).most_common()
    extra = {"finished": finished, "images": num, "quarantined": len(bad), "reasons": dict(reasons)}
    if not asked.json:
        if reasons:
            table("Quarantined", ("reason", "images"), [(reason, f"{count:,}") for reason, count in reasons])
        state = "" if finished else "; the conversion has not finished"
        console().print(f"{len(bad):,} of {num:,} images of {out.uri} are in quarantine{state}", soft_wrap=True)
        if not finished and not num:
            console().print(
                "It wrote no shard; images that cannot be decoded get their reasons when shards are written."
            )
    listing = _Listing(store, out, bad, places, {}, told="reason")
    return listing.show(asked, title="Images", everything=asked.all, extra=extra)


@dataclass(frozen=True)
class _Listing:
    """Samples with their files, as a table, JSON or CSV."""

    store: Store
    out: Store
    samples: Sequence[Sample]
    places: Places | None
    """None where files were not asked for."""
    predicted: dict[str, Predicted]
    told: str = "state"
    """The column that says what became of a sample; where all are in quarantine, `reason`."""

    def show(self, asked: Any, *, title: str, everything: bool, extra: dict[str, Any] | None = None) -> int:
        """Prints or writes what was asked for; returns the exit code."""
        rows = self._rows()
        if asked.out:
            self._write(rows, Path(asked.out))
        if asked.json:
            told = {"dataset": self._name(), **(extra or {}), **self._found(rows), "samples": rows}
            print(json_.dumps(told, indent=2))
            return 0
        if not asked.out:
            self._print(rows, title, everything or asked.all)
        for line in self._notes(rows):
            console().print(line, soft_wrap=True)
        if asked.out:
            console().print(f"{len(rows):,} samples of {self.out.uri} are in {asked.out}", soft_wrap=True)
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
            why = "it was removed or renamed" if missing < len(rows) else "is that the right --source?"
            yield f"{missing:,} of {len(rows):,} have no file in the source any more: {why}"
        if self.places.unlisted:
            yield f"{self.places.unlisted:,} images of the source are not in the dataset: they came later"
        yield from (printable(note) for note in self.places.notes)

    def _name(self) -> str:
        return "/".join(self.out.uri.rsplit("/", 2)[1:])

    def _print(self, rows: Sequence[dict], title: str, everything: bool) -> None:
        shown = rows if everything else rows[:SHOWN]
        columns = ["key", "split", "label"]
        # A test image that a run has predicted is in a shard.
        columns += ["predicted", "score"] if self.predicted else [self.told]
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
            # Several labels, as a table of an image set has them.
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
    """A sample's file as the terminal shows it."""
    return _file_text(place.path, place.frame) if place else _file_text(None, None)


def _file_text(path: str | None, frame: int | None) -> str:
    if path is None:
        return "(not in the source)"
    return printable(path) + (f", frame {frame}" if frame else "")


# ---------------------------------------------------------------------------------------- dataset, settings, source


def dataset_in(store: Store, name: str, *, unfinished: bool = False) -> Store:
    """Where the dataset is. UsageError, listing what there is, where there is none or it is not clear which."""
    there = dataset_names(store, unfinished=unfinished)
    if not there:
        kind = "dataset" if unfinished else "finished dataset"
        raise UsageError(f"{store.uri} holds no {kind}: `medmamba shard` makes one, or name another --store")
    matching = [each for each in there if not name or each == name or each.partition("/")[0] == name]
    if len(matching) != 1:
        how = "which one is not said" if not name else f"{name!r} is {len(matching) or 'none'} of them"
        raise UsageError(f"{store.uri} holds the datasets {', '.join(there)}, and {how}: give DATASET/NAME")
    return store.at("datasets", *matching[0].split("/"))


def dataset_names(store: Store, *, unfinished: bool = False) -> list[str]:
    """The datasets of a store as DATASET/NAME; with those whose conversion has not finished, if these are wanted."""
    marks = (MANIFEST, SETTINGS) if unfinished else (MANIFEST,)
    keys = [key for key in store.at("datasets").list() if key.count("/") == 2]
    return sorted({key.rpartition("/")[0] for key in keys if key.rpartition("/")[2] in marks})


def owners_config(store: Store, out: Store, owner: Owner) -> DataConfig:
    """The settings that the dataset was made with, its salt and its source. UsageError where the salt is not known."""
    config, digest = settings_on_record(out)
    if owner.source:
        config = config.model_copy(update={"source": owner.source})
    if owner.salt and salt_digest(owner.salt) != digest:
        has = "another salt" if digest else "no salt"
        raise UsageError(f"--salt is not what {out.uri} was made with, which has {has}: correct it, or leave it out")
    salt = owner.salt or (_salt_of_a_run(store, digest) if digest else "")
    if salt is None:
        raise UsageError(
            f"{out.uri} was made with a salt (--data.salt), which no run of this store has on record: give it with "
            "--salt"
        )
    return config.model_copy(update={"salt": salt})


def _salt_of_a_run(store: Store, digest: str) -> str | None:
    """The salt of this digest that a run was begun with."""
    for key in store.list("runs/"):
        if key.count("/") == 2 and key.endswith("/workflow.json"):
            found = _json(store, key).get("recipe", {})
            data = found.get("data", {}) if isinstance(found, dict) else {}
        elif key.count("/") == 3 and key.endswith("/shard/config.json"):
            data = _json(store, key).get("config", {})
        else:
            continue
        salt = data.get("salt") if isinstance(data, dict) else None
        if isinstance(salt, str) and salt_digest(salt) == digest:
            return salt
    return None


def _json(store: Store, key: str) -> dict[str, Any]:
    try:
        found = json_.loads(store.get(key))
    except (StoreKeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_places(config: DataConfig, wanted: set[str]) -> Places:
    """See `names.find`. UsageError where the source is not there."""
    try:
        return find(config, wanted)
    except ValueError as error:
        raise UsageError(
            f"the images are looked for in {config.source or 'no place that is on record'} ({error}): give the place "
            "where they are now with --source"
        ) from None


def check_target(target: str, store: Store, config: DataConfig, *, kind: str) -> None:
    """UsageError where a file with names may not be written: into the store, the image set, or over another file."""
    if not target:
        return
    path = Path(target)
    real = path.absolute().parent.resolve() / path.name
    if path.suffix.lower() != kind or not real.parent.is_dir():
        raise UsageError(f"{target}: give a {kind} file in a folder that exists")
    if store.is_local and real.is_relative_to(Path(store.uri).resolve()):
        raise UsageError(f"{target} is in the store, which holds no file names: write it elsewhere")
    source = Path(config.source).expanduser().resolve() if config.source and "://" not in config.source else None
    if source is not None and real.is_relative_to(source if source.is_dir() else source.parent):
        raise UsageError(f"{target} is among the images, and would become a part of the set: write it elsewhere")
    if path.exists() and not (path.is_file() and _OURS[kind] in path.read_bytes()[:4096]):
        raise UsageError(f"{target} exists and was not written by this command: give another file")


_OURS = {".csv": ",".join(COLUMNS).encode(), ".html": b": duplicates</title>"}


# ---------------------------------------------------------------------------------------------------- words and keys


def _dataset_and_keys(store: Store, asked: NamesArguments) -> tuple[str, list[str]]:
    """The dataset's name and the beginnings of keys that are meant. UsageError where a word could be either."""
    words, there = list(asked.words), dataset_names(store)
    name = ""
    if asked.predictions and not words:
        name = _dataset_of_run(store, asked.predictions)
    elif words and (words[0] in there or any(each.partition("/")[0] == words[0] for each in there)):
        name = words.pop(0)
        if len(there) == 1 and _is_key(name) and not asked.keys and not words:
            raise UsageError(
                f"shards names: {name} is a dataset and may begin a key: write --keys {name}, or {there[0]}"
            )
    elif words and not _is_key(words[0]):
        name = words.pop(0)  # which `dataset_in` refuses, with what there is
    prefixes = [word.lower() for word in (*words, *asked.keys)]
    wrong = [word for word in prefixes if not _is_key(word)]
    if wrong:
        raise UsageError(f"shards names: {wrong[0]!r} does not begin a key: keys are 20 hex digits")
    return name, prefixes


def _is_key(word: str) -> bool:
    return 0 < len(word) <= 20 and set(word.lower()) <= _KEY


def _dataset_of_run(store: Store, run: str) -> str:
    data = _json(store, f"runs/{run}/shard/record.json").get("facts", {}).get("data", "")
    return str(data).removeprefix("datasets/")


def _matching(known: list[Sample], prefixes: Sequence[str], out: Store) -> list[Sample]:
    if not prefixes:
        return known
    for prefix in prefixes:
        if not any(each.key.startswith(prefix) for each in known):
            raise UsageError(f"shards names: no sample of {out.uri} has a key that begins with {prefix}")
    return [each for each in known if each.key.startswith(tuple(prefixes))]
