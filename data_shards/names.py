"""From key to file: finds the samples of a dataset in its source, on the machine that has the images.

Keys are hashes, so files are found by hashing the names in the source. No image is read, and nothing is written to a
store.
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
    """One sample of a dataset, as the store describes it."""

    key: str
    split: str = ""
    labels: tuple[str, ...] = ()
    """Class names."""
    state: str = IN_SHARD
    """IN_SHARD, QUARANTINED or DROPPED (as a duplicate)."""
    reason: str = ""
    """Why the sample is not in a shard."""


@dataclass(frozen=True)
class Place:
    """Location of a sample's image in the source."""

    path: str
    """Path inside the image set; the key is made from it."""
    frame: int
    file: str
    """Path or URI that opens it."""
    row: Row | None = None
    """Its row in the image set; None if the set could not be read."""


@dataclass(frozen=True)
class Places:
    """The files of a dataset's samples that the source still has, by key."""

    of: Mapping[str, Place]
    unlisted: int | None
    """Number of images in the source that are not in the dataset; None if unknown."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""
    image_set: ImageSet | None = field(default=None, repr=False)


def samples(dataset: Dataset, report: DuplicatesReport) -> list[Sample]:
    """All samples of a finished dataset: in its shards, quarantined and dropped."""
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
    """The undecodable images of an unfinished conversion, and the number of images in its finished shards."""
    found, num = [], 0
    for key in out.list("parts/"):
        try:
            part = ShardPart.model_validate_json(out.get(key))
        except (StoreKeyError, ValidationError):  # just replaced, or damaged: the next attempt rewrites it
            continue
        bad: tuple[Quarantined, ...] = part.quarantine
        found += [Sample(each.key, part.split, (), QUARANTINED, each.reason) for each in bad]
        num += len(part.samples) + len(bad)
    return found, num


def find(config: DataConfig, wanted: Collection[str]) -> Places:
    """The files of the keys `wanted`, which are all keys of a dataset made with `config`.

    A source that has changed since is not an error: keys without a file are missing from the result. If it can no
    longer be read as before, files are found by hashing every suffix of their paths.

    Raises ValueError if the source is missing.
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
        places, notes = _by_path(config, wanted), [f"the source can no longer be read as before: {error}"]
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
    """The sample, with the source's labels if the store has none."""
    if sample.labels or place is None or place.row is None or image_set is None:
        return sample
    return replace(sample, labels=named_labels(place.row.labels, image_set.classes))


def _base(config: DataConfig) -> str:
    """The prefix that turns a path inside the source into a full path or URI."""
    if not config.source:
        return ""
    source = config.source
    if resolved(config).layout == "table" and source.lower().endswith(ENDINGS):
        source = source.rpartition("/")[0] or ("/" if source.startswith("/") else ".")
    return source if source.endswith("/") else f"{source}/"


def _by_path(config: DataConfig, wanted: Collection[str]) -> dict[str, Place]:
    """Files with a path suffix that gives a wanted key, except keys that several files give."""
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
    """Frames and their keys, endlessly: only the dataset knows how many frames a file has."""
    frame = 0
    while True:
        yield frame, sample_key(config.dataset, config.salt, where, frame)
        frame += 1


def _dropped(report: DuplicatesReport, classes: tuple[str, ...]) -> list[Sample]:
    listed = {
        copy.key: (copy, finding)
        for finding in report.findings
        for copy in finding.copies
        if copy.fate == "dropped" and not copy.dataset
    }
    found = []
    for key in report.dropped:
        if key in listed:
            copy, finding = listed[key]
            found.append(Sample(key, copy.split, named_labels(copy.labels, classes), DROPPED, _why(finding)))
        else:  # the report lists a limited number of findings
            found.append(Sample(key, state=DROPPED, reason="duplicate"))
    return found


def _why(finding: Finding) -> str:
    under = ", under different labels" if finding.conflict else ""
    return f"duplicate ({finding.head}) {finding.where}{under}"
