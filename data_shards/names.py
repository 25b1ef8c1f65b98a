"""From key to file: the samples of a dataset found again in its source, on the machine of the images' owner.

Keys are hashes, so a file's name is found by hashing the names that are in the source. No image is read, and nothing
of this is written to a store.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from data_shards.config import DataConfig
from data_shards.duplicates import DuplicatesReport, Finding, named_labels
from data_shards.duplicates.scan import stored_samples
from data_shards.manifest import Dataset
from data_shards.plan import sample_key
from data_shards.shard import Quarantined, ShardPart
from data_shards.source import ImageSet, Row, open_source, resolved
from data_shards.source.files.open import open_files
from data_shards.source.table.text_table import ENDINGS
from data_shards.store import Store, StoreKeyError

IN_SHARD, QUARANTINED, DROPPED = "in shard", "quarantined", "dropped"


@dataclass(frozen=True)
class Sample:
    """What a store says of one sample of a dataset."""

    key: str
    split: str = ""
    labels: tuple[str, ...] = ()
    """Class names."""
    state: str = IN_SHARD
    """In a shard, quarantined, or dropped as a duplicate."""
    reason: str = ""
    """Why it is not in a shard."""


@dataclass(frozen=True)
class Place:
    """Where a sample's image is in the source."""

    path: str
    """Path inside the set, which the key is made from."""
    frame: int
    file: str
    """The address that opens it."""
    row: Row | None = None
    """Its row in the image set; none where the set could not be read as such."""


@dataclass(frozen=True)
class Places:
    """The files of a dataset's keys, as far as the source still has them."""

    of: Mapping[str, Place]
    unlisted: int | None
    """Images of the source that the dataset does not know; none where that is not known."""
    notes: tuple[str, ...] = ()
    """What else its owner should know."""
    image_set: ImageSet | None = field(default=None, repr=False)


def samples(dataset: Dataset, report: DuplicatesReport) -> list[Sample]:
    """All samples of a finished dataset: those in its shards, those in quarantine and those that were dropped."""
    classes, table = dataset.manifest.classes, dataset.table.select(["key", "split", "labels"])
    columns = (table[name].to_pylist() for name in ("key", "split", "labels"))
    found = [Sample(key, split, named_labels(labels, classes)) for key, split, labels in zip(*columns, strict=True)]
    return [*found, *quarantined(dataset), *_dropped(report, classes)]


def quarantined(dataset: Dataset) -> list[Sample]:
    """The samples of a finished dataset that could not be decoded."""
    reasons = {each.key: each.reason for each in dataset.manifest.quarantine}
    known = stored_samples(dataset.store, reasons) if reasons else {}
    found = []
    for key, reason in reasons.items():
        split, labels = known.get(key, ("", ()))
        found.append(Sample(key, split, named_labels(labels, dataset.manifest.classes), QUARANTINED, reason))
    return found


def quarantined_so_far(out: Store) -> tuple[list[Sample], int]:
    """The undecodable images of a conversion that has not finished, and how many images its shards were made from."""
    found, num = [], 0
    for key in out.list("parts/"):
        try:
            part = ShardPart.model_validate_json(out.get(key))
        except (StoreKeyError, ValidationError):  # replaced just now, or damaged: made again by the next try
            continue
        bad: tuple[Quarantined, ...] = part.quarantine
        found += [Sample(each.key, part.split, (), QUARANTINED, each.reason) for each in bad]
        num += len(part.samples) + len(bad)
    return found, num


def find(config: DataConfig, wanted: Collection[str]) -> Places:
    """The files of the keys `wanted`, which are all those of a dataset; `config` is what it was made with.

    A source that has changed since is not an error: keys without a file are missing from the result. Where it can no
    longer be read as it was, files are found by hashing all ends of their paths.

    Raises ValueError where there is no source at all.
    """
    source = config.source
    if source and "://" not in source:
        source = os.path.abspath(os.path.expanduser(source))
    config = config.model_copy(update={"rows_without_file": "drop", "source": source})
    places, notes, image_set, unlisted = {}, [], None, None
    try:
        image_set = open_source(config)
        rows = image_set.rows
    except ValueError as error:
        if resolved(config).layout not in ("folders", "table"):
            raise
        places, notes = _by_path(config, wanted), [f"the source is not read as it was then: {error}"]
    else:
        base = _base(config)
        keys = (sample_key(config.dataset, config.salt, row.where, row.frame) for row in rows)
        for row, key in zip(rows, keys, strict=True):
            if key in wanted:
                places[key] = Place(row.where, row.frame, f"{base}{image_set.reader.inside(row)}", row)
        unlisted = len(rows) - len(places)
        if len(places) < len(wanted) and resolved(config).layout in ("folders", "table"):
            places = {**_by_path(config, wanted), **places}
    return Places(places, unlisted, tuple(notes), image_set)


def with_labels(sample: Sample, place: Place | None, image_set: ImageSet | None) -> Sample:
    """The sample with the labels that the source gives it, where the store does not say them."""
    if sample.labels or place is None or place.row is None or image_set is None:
        return sample
    return replace(sample, labels=named_labels(place.row.labels, image_set.classes))


def _base(config: DataConfig) -> str:
    """What stands before a path inside the source to make it an address."""
    if not config.source:
        return ""
    source = config.source
    if resolved(config).layout == "table" and source.lower().endswith(ENDINGS):
        source = source.rpartition("/")[0] or ("/" if source.startswith("/") else ".")
    return source if source.endswith("/") else f"{source}/"


def _by_path(config: DataConfig, wanted: Collection[str]) -> dict[str, Place]:
    """Files one of whose ends of the path gives a wanted key; not those of which several give the same."""
    base = _base(config)
    found: dict[str, Place] = {}
    times: Counter[str] = Counter()
    for name in open_files(base.rstrip("/") or "/").names:
        for tail in _tails(name):
            for frame, key in _frames(config, tail):
                if key not in wanted:
                    break
                times[key] += 1
                found[key] = Place(tail, frame, f"{base}{name}")
    return {key: place for key, place in found.items() if times[key] == 1}


def _tails(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition("/")[2]


def _frames(config: DataConfig, where: str) -> Iterator[tuple[int, str]]:
    """Frames and their keys, without end: how many there are only the dataset knows."""
    frame = 0
    while True:
        yield frame, sample_key(config.dataset, config.salt, where, frame)
        frame += 1


def _dropped(report: DuplicatesReport, classes: tuple[str, ...]) -> list[Sample]:
    told = {
        copy.key: (copy, finding)
        for finding in report.findings
        for copy in finding.copies
        if copy.fate == "dropped" and not copy.dataset
    }
    found = []
    for key in report.dropped:
        if key in told:
            copy, finding = told[key]
            found.append(Sample(key, copy.split, named_labels(copy.labels, classes), DROPPED, _why(finding)))
        else:  # of a report that had no room for it
            found.append(Sample(key, state=DROPPED, reason="duplicate"))
    return found


def _why(finding: Finding) -> str:
    under = ", under different labels" if finding.conflict else ""
    return f"duplicate ({finding.head}) {finding.where}{under}"
