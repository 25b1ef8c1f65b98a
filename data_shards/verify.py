"""Reads a finished dataset completely and lists every difference from its manifest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_shards.config import DataConfig
from data_shards.decode import UndecodableImage, decode, stored
from data_shards.duplicates import read_report
from data_shards.duplicates.fingerprint import pixel_digest
from data_shards.duplicates.scan import FINGERPRINTS, stored_digests
from data_shards.duplicates.scan import FOLDER as SCAN
from data_shards.index import METADATA, SplitIndex
from data_shards.manifest import Dataset, ManifestError, ShardEntry, channel_statistics, open_dataset
from data_shards.plan import sample_keys
from data_shards.settings import settings_on_record
from data_shards.shard import IMAGE_MEMBERS, part_key, pixel_histogram, tar_key
from data_shards.source import open_source
from data_shards.split import LeakError
from data_shards.store import Store, StoreError, StoreKeyError, open_store

MAX_PROBLEMS = 20  # listed per shard
COMPARED_SAMPLES = 16  # whose pixels are compared when a source has moved, at most

RunTasks = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]


@dataclass
class Verified:
    """How much was read, and the problems that were found."""

    uri: str
    digest: str = ""
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    """Objects that do not belong to the dataset; nothing reads them."""


@dataclass(frozen=True)
class VerifyTask:
    """One shard to verify. Picklable; holds nothing about other shards."""

    uri: str
    split: str
    entry: ShardEntry
    index: SplitIndex
    """Samples of this shard."""
    digests: dict[str, bytes]
    """Pixel digests by sample key."""
    has_cls: bool


@dataclass
class _ReadShard:
    name: str
    samples: int
    bytes: int
    histogram: np.ndarray
    problems: list[str]


def verify(
    out: Store, *, run_tasks: RunTasks = map, progress: Callable[[int, int, str], None] = lambda done, total, unit: None
) -> Verified:
    """Compares every object, tar member and pixel of the dataset in `out` with manifest, index and fingerprints.

    Args:
        out: The dataset's store, datasets/<dataset>/<name>.
        run_tasks: Runs `read_shard` on picklable tasks; like `map`, but results may come in any order.
        progress: Called with (shards done, total, "shards").
    """
    found = Verified(out.uri)
    try:
        dataset = open_dataset(out)
        read_report(out)
        digests = stored_digests(out)
        found.problems += _metadata_problems(dataset)
    except (ManifestError, LeakError, StoreError) as error:
        found.problems.append(str(error))
        return found
    found.digest = dataset.digest
    train = np.zeros((3, 256), np.int64)
    tasks = list(_tasks(dataset, digests))
    for done, read in enumerate(run_tasks(read_shard, tasks), 1):
        found.shards, found.samples, found.bytes = done, found.samples + read.samples, found.bytes + read.bytes
        found.problems += read.problems
        train += read.histogram if read.name.startswith("train-") else 0
        progress(done, len(tasks), "shards")
    manifest = dataset.manifest
    if not found.problems and channel_statistics(train[: manifest.channels]) != (manifest.mean, manifest.std):
        found.problems.append("the manifest's mean and std differ from those of the train split's pixels")
    expected = {key(shard.name) for shard in manifest.shards for key in (tar_key, part_key)}
    found.strays = sorted({key for folder in ("shards/", "parts/", SCAN) for key in out.list(folder)} - expected)
    found.problems.sort()
    return found


def _metadata_problems(dataset: Dataset) -> list[str]:
    """What is wrong with the metadata. ManifestError where they are damaged or of other samples."""
    names = set(dataset.metadata("train"))
    with contextlib.suppress(ValueError):  # damaged settings: the manifest knows their digest
        wanted = set(settings_on_record(dataset.store)[0].metadata_columns)
        if names != wanted:
            told = [", ".join(sorted(each)) or "none" for each in (names, wanted)]
            return [f"{METADATA} has the columns {told[0]}, but the dataset was made with {told[1]}"]
    return []


def check_moved(config: DataConfig, dataset: Dataset) -> None:
    """Checks that `config.source` still has the images that a finished dataset was made from.

    Classes and task must match. Every sample of the dataset must be in the source under the same name, with the same
    labels, and in the test split if the source says so. Pixels are compared for up to COMPARED_SAMPLES samples. Images
    added to the source are ignored. Raises ValueError at the first difference.
    """
    image_set, manifest = open_source(config), dataset.manifest
    if (tuple(image_set.classes), image_set.task) != (tuple(manifest.classes), manifest.task):
        has, made = ", ".join(image_set.classes), ", ".join(manifest.classes)
        raise ValueError(_other_images(config, dataset, f"has the classes {has} ({image_set.task}), not {made} as"))
    rows = dict(zip(sample_keys(image_set.rows, config), image_set.rows, strict=True))
    columns = [dataset.table.column(name) for name in ("key", "labels", "split")]
    for sample in zip(*columns, strict=True):
        key, labels, split = (value.as_py() for value in sample)
        row = rows.get(key)
        if row is None:
            raise ValueError(_other_images(config, dataset, "does not have an image of"))
        if set(row.labels) != set(labels):
            raise ValueError(_other_images(config, dataset, f"has other labels for {row.where!r} than"))
        # Validation may have been drawn from train, and a duplicate may have been moved to the other split.
        if row.split and config.duplicates.across != "move" and (row.split == "test") != (split == "test"):
            raise ValueError(_other_images(config, dataset, f"has {row.where!r} in {row.split}, not in {split} as"))
    for found in _spread(dataset, COMPARED_SAMPLES):
        row = rows[found["key"]]
        data = dataset.store.get(tar_key(found["shard"]), start=found["offset"], length=found["size"])
        try:
            is_same = np.array_equal(decode(data), stored(image_set.reader.read(row), max_side=config.max_side)[2])
        except UndecodableImage:
            is_same = False
        if not is_same:
            raise ValueError(_other_images(config, dataset, f"has another image in {row.where!r} than"))


def _spread(dataset: Dataset, most: int) -> list[dict[str, Any]]:
    """Up to `most` rows of the index, evenly spaced."""
    every = max(1, -(-len(dataset.table) // most))
    rows: list[dict[str, Any]] = dataset.table.take(list(range(0, len(dataset.table), every))).to_pylist()
    return rows


def _other_images(config: DataConfig, dataset: Dataset, what: str) -> str:
    return (
        f"--data.source {config.source} {what} the finished dataset {dataset.store.uri}; to convert another image set, "
        "choose a new --data.name"
    )


def read_shard(task: VerifyTask) -> _ReadShard:
    """Reads and checks one shard; runs in any process."""
    entry, index = task.entry, task.index
    read = _ReadShard(entry.name, 0, 0, np.zeros((3, 256), np.int64), [])
    key = tar_key(entry.name)
    try:
        data = open_store(task.uri).get(key)
    except StoreKeyError:
        read.problems.append(f"{key} is missing")
        return read
    except StoreError as error:
        read.problems.append(str(error))
        return read
    read.bytes = len(data)
    if (len(data), hashlib.sha256(data).hexdigest()) != (entry.bytes, entry.sha256):
        read.problems.append(
            f"{key} has {len(data)} bytes, but the manifest says {entry.bytes}"
            if len(data) != entry.bytes
            else f"{key} has a different sha256 than the manifest"
        )
    try:
        samples = _members(data)
    except (tarfile.TarError, ValueError, OSError, EOFError, KeyError) as error:
        read.problems.append(f"{key} is not a complete tar file ({error})")
        return read
    if list(samples) != index.key.tolist():
        read.problems.append(f"{key} has {len(samples)} samples; they differ from the {len(index)} in the index")
    for position, name in enumerate(index.key.tolist()):
        if name in samples:
            problem = _sample_problem(samples[name], task, position, read)
            if problem:
                read.problems.append(f"{key}: sample {name} {problem}")
    read.samples = len(samples)
    hidden = len(read.problems) - MAX_PROBLEMS
    if hidden > 0:
        read.problems[MAX_PROBLEMS:] = [f"{key}: and {hidden} more problems"]
    return read


def _tasks(dataset: Dataset, digests: dict[str, bytes]) -> Iterator[VerifyTask]:
    manifest = dataset.manifest
    has_cls = manifest.task != "multilabel"
    for position, entry in enumerate(manifest.shards):
        split = entry.name.partition("-")[0]
        full = dataset.index(split)
        chosen = full.shard == position
        index = SplitIndex(**{name: getattr(full, name)[chosen] for name in SplitIndex.__dataclass_fields__})
        known = {key: digests[key] for key in index.key.tolist() if key in digests}
        yield VerifyTask(dataset.store.uri, split, entry, index, known, has_cls)


def _members(data: bytes) -> dict[str, dict[str, tuple[int, bytes]]]:
    """For each sample in the tar: extension -> (offset of its bytes, bytes)."""
    samples: dict[str, dict[str, tuple[int, bytes]]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            members = samples.setdefault(key, {})
            if extension in members:
                raise ValueError(f"{info.name} appears twice")
            members[extension] = info.offset_data, data[info.offset_data : info.offset_data + info.size]
    return samples


def _sample_problem(members: dict[str, tuple[int, bytes]], task: VerifyTask, i: int, read: _ReadShard) -> str:
    """The problem with the sample at position i of the shard's index; "" if it is correct."""
    index, split, has_cls = task.index, task.split, task.has_cls
    digest = task.digests.get(str(index.key[i]))
    images = [extension for extension in members if extension in IMAGE_MEMBERS]
    if len(images) != 1 or set(members) != {images[0], "json", *(["cls"] if has_cls else [])}:
        return f"has the members {', '.join(sorted(members))}"
    labels = np.flatnonzero(index.labels[i]).tolist()
    expected = {"group": str(index.group[i]), "key": str(index.key[i]), "labels": labels, "split": split}
    try:
        if json.loads(members["json"][1]) != expected:
            return "has different labels, group or split than the index"
    except ValueError:
        return "has a .json that is not JSON"
    if has_cls and members["cls"][1] != str(labels[0]).encode():
        return "has a different class than the index"
    offset, image = members[images[0]]
    if (offset, len(image)) != (index.offset[i], index.size[i]):
        return "has a different position or size than in the index"
    try:
        pixels_HWC = decode(image, examined=True)
    except UndecodableImage as error:
        return f"cannot be decoded ({error.reason})"
    if pixels_HWC.shape != (index.height[i], index.width[i], index.channels[i]):
        return f"has the shape {pixels_HWC.shape}"
    if digest is None or pixel_digest(pixels_HWC).tobytes() != digest:
        return f"has different pixels than in {FINGERPRINTS}"
    read.histogram += pixel_histogram(pixels_HWC)
    return ""
