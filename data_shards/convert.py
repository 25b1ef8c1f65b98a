"""Image set -> shards -> index -> manifest, written in this order: a dataset with a manifest is complete.

A killed conversion can be resumed: shards with a commit mark are kept.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_shards.catalog import card, names
from data_shards.config import DataConfig
from data_shards.decode import UndecodableImage, decode
from data_shards.duplicates import REPORT, Copy, DuplicatesError, DuplicatesReport, read_report, refuse_elsewhere
from data_shards.duplicates.fingerprint import Fingerprints
from data_shards.duplicates.guard import guard
from data_shards.duplicates.page import PAGE, page
from data_shards.duplicates.scan import (
    FINGERPRINTS,
    FOLDER,
    REFUSED,
    Scan,
    fingerprints_bytes,
    kept_if_ended,
    other_datasets,
    scan_rows,
)
from data_shards.index import index_bytes, index_table, write_metadata
from data_shards.manifest import (
    INDEX,
    MANIFEST,
    Dataset,
    IndexEntry,
    Manifest,
    ShardEntry,
    channel_statistics,
    count_splits,
    manifest_digest,
    open_dataset,
)
from data_shards.options import listing_command
from data_shards.plan import ShardPlan, config_digest, plan_shards, sample_keys
from data_shards.quarantine import check_lost_classes, check_quarantine, first_named
from data_shards.settings import SETTINGS, has_moved, refuse_drift, settings_bytes, splits_from
from data_shards.shard import ShardPart, ShardTask, find_shard, part_key, tar_key, write_shard
from data_shards.source import ImageSet, Row, open_source
from data_shards.split import assign_splits
from data_shards.store import Store, StoreKeyError
from data_shards.store.lease import Lease, one_driver
from data_shards.verify import check_moved

LEASE = ".lease.json"
_ABANDONED_S = 6 * 3600  # no upload of a shard takes that long
_log = logging.getLogger(__name__)

RunTasks = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
Progress = Callable[[int, int, str], None]


def convert(
    config: DataConfig,
    out: Store,
    *,
    run_tasks: RunTasks = map,
    progress: Progress = lambda done, total, unit: None,
) -> dict[str, Any]:
    """Writes the dataset of `config` into `out` (rooted at `datasets/<dataset>/<name>`), unless it is already there.

    Args:
        config: Settings of the conversion.
        out: The store to write to.
        run_tasks: Runs `scan_rows` and `write_shard` on picklable tasks; like `map`, but results may come in any order.
        progress: Called with (done, total, unit): unit is "images" while fingerprinting, then "shards".

    Returns:
        Facts: digest (the dataset's version), uri, dataset, task, counts {split: {class: n}}, samples {split: n}
        (not the sum of the counts if multilabel), splits_from (a clause, or ""), num_shards, num_images, bytes,
        quarantine (number of images), leaks {what: number of copies}, dropped (number of images), made and kept
        (shards written now, shards found).

    Raises:
        ValueError: the store has a dataset with other settings, the image set or its splits are invalid, or more
            images than `max_quarantine` cannot be decoded. No manifest is written.
        DuplicatesError: an image is in two splits, and the config refuses that. No shard is written.
    """
    if out.head(MANIFEST) is not None:
        return _facts(_found(config, out), made=0)
    # Two drivers with equal settings write equal bytes, so both may run. Only stores without conditional writes need
    # a single driver.
    with one_driver(out, LEASE, f"{socket.gethostname()}, process {os.getpid()}") as held:
        _remove_abandoned(out)
        image_set = _open(config)
        settings = settings_bytes(config, image_set.splits_from)
        made = Conversion(_findable(config), out, image_set, settings, run_tasks, progress, held).run()
    return _facts(open_dataset(out), made=made)


@dataclass(frozen=True)
class Conversion:
    """Conversion of one image set: scan, guard, write, commit."""

    config: DataConfig
    out: Store
    image_set: ImageSet
    settings: bytes
    """The settings file stored with the dataset."""
    run_tasks: RunTasks
    progress: Progress
    held: Lease | None

    def run(self) -> int:
        """Runs all steps up to the manifest; returns the number of shards written."""
        keys = sample_keys(self.image_set.rows, self.config)
        self.out.ensure(SETTINGS, self.settings)
        scan = Scan(self.image_set, self.config, self.out)
        with kept_if_ended(scan, self.out):
            self._scan(scan)
            chosen = self._guard(keys, scan.prints)
            written = self._write(chosen)
            self._commit(chosen, written)
        return written.made

    def _scan(self, scan: Scan) -> None:
        """Completes the fingerprints; images that an earlier attempt has fingerprinted are not read again."""
        num = len(self.image_set.rows)
        done = num - len(scan.missing)
        self.progress(done, num, "images")
        for positions, prints in self.run_tasks(scan_rows, scan.tasks()):
            scan.add(positions, prints)
            done += len(prints)
            self.progress(done, num, "images")

    def _guard(self, keys: Sequence[str], prints: Fingerprints) -> _Chosen:
        """The rows that remain after handling duplicates, with their splits. DuplicatesError if the config refuses."""
        self.out.delete(REFUSED)  # from an earlier attempt
        config, image_set = self.config, self.image_set
        draw = functools.partial(
            assign_splits,
            num_classes=len(image_set.classes),
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction,
            seed=config.seed,
            classes=image_set.classes,
        )
        try:
            guarded = guard(
                image_set.rows,
                prints,
                config.duplicates,
                draw=draw,
                keys=keys,
                classes=image_set.classes,
                official=config.dataset in names() and card(config.dataset).split_policy.startswith("official"),
                others=() if config.duplicates.datasets == "off" else other_datasets(self.out, config.dataset),
            )
        except DuplicatesError as refusal:
            raise self._refused(refusal) from None
        rows = guarded.rows
        return _Chosen(
            [image_set.rows[i] for i in rows],
            [keys[i] for i in rows],
            guarded.splits,
            Fingerprints(*(column[rows] for column in (prints.state, prints.pixels, prints.bits, prints.size))),
            guarded.report,
        )

    def _refused(self, refusal: DuplicatesError) -> DuplicatesError:
        """Stores the report of the duplicates; returns the error with the command that lists them."""
        self.out.put(REFUSED, refusal.report.model_dump_json(indent=1).encode())
        found = DuplicatesError(f"{refusal}; `{_listing('duplicates', self.config, self.out)}` lists all duplicates")
        counts = "; ".join(f"{count} {what}" for what, count in refusal.report.counts.items() if count)
        found.public = f"refused because of duplicates: {counts}"
        return found

    def _write(self, chosen: _Chosen) -> _Written:
        """Writes the shards, except those that an earlier attempt has finished."""
        config, out, image_set = self.config, self.out, self.image_set
        sizes = chosen.prints.size.tolist()
        plans = plan_shards(chosen.rows, chosen.splits, config, keys=chosen.keys, sizes=sizes)
        tasks = [ShardTask(image_set.reader, plan, config, image_set.task, out) for plan in plans]
        found = {task.plan.name: find_shard(task) for task in tasks}
        # A shard with quarantined images is written again: they may have been repaired since.
        parts = {name: _Part(part) for name, part in found.items() if part and not part.quarantine}
        missing = [task for task in tasks if task.plan.name not in parts]
        self.progress(len(parts), len(plans), "shards")
        for part in self.run_tasks(write_shard, missing):
            parts[part.name] = _Part(part)
            self.progress(len(parts), len(plans), "shards")
        return _Written(plans, [parts[plan.name] for plan in plans], len(missing))

    def _commit(self, chosen: _Chosen, written: _Written) -> None:
        """Writes fingerprints, duplicates report and index, then the manifest, which makes the dataset complete."""
        config, out = self.config, self.out
        if self.held is not None:
            self.held.check()
        _remove_strays(written.plans, out)
        self._write_report(chosen)
        if not out.holds(SETTINGS, self.settings):
            raise ValueError(
                f"another conversion with different settings started in {out.uri} and may have replaced shards of "
                "this one; rerun when it has ended, with a different --data.name for one of them"
            )
        index, manifest = _contents(written, self.image_set, config, _listing("quarantine", config, out))
        data = (manifest.model_dump_json(indent=1) + "\n").encode()
        out.ensure(INDEX, index)
        quarantined = {image.key for image in manifest.quarantine}
        write_metadata(out, config.metadata_columns, chosen.keys, chosen.rows, without=quarantined)
        if not out.put(MANIFEST, data, if_absent=True) and out.get(MANIFEST) != data:
            raise ValueError(
                f"another conversion finished {out.uri} with different settings while this one ran; use a different "
                "--data.name for one of them"
            )
        for key in list(out.list(FOLDER)):
            out.delete(key)

    def _write_report(self, chosen: _Chosen) -> None:
        """Writes the fingerprints, and the duplicates report as JSON and as a page."""
        image_set, out = self.image_set, self.out
        out.ensure(FINGERPRINTS, fingerprints_bytes(chosen.keys, chosen.rows, chosen.splits, chosen.prints))

        def picture(copy: Copy) -> np.ndarray | None:
            try:
                return None if copy.dataset else decode(image_set.reader.read(image_set.rows[copy.row]))
            except UndecodableImage:
                return None

        title = f"{self.config.dataset}/{self.config.name}"
        shown = page(chosen.report, title=title, classes=image_set.classes, picture=picture)
        out.ensure(REPORT, (chosen.report.model_dump_json(indent=1) + "\n").encode())
        out.ensure(PAGE, shown.encode())


def key_map(config: DataConfig) -> Iterator[tuple[str, str, int]]:
    """(key, path inside the set, frame) of every sample, computed from the source because it is never stored."""
    rows = open_source(config).rows
    for row, key in zip(rows, sample_keys(rows, config), strict=True):
        yield key, row.where, row.frame


@dataclass(frozen=True)
class _Chosen:
    """The rows to convert, column by column, and the duplicates report."""

    rows: list[Row]
    keys: list[str]
    splits: list[str]
    prints: Fingerprints
    report: DuplicatesReport


class _Part:
    """What the driver keeps of a written shard; samples as columns, because there may be millions."""

    def __init__(self, part: ShardPart):
        self.table, self.quarantine, self.flaws = index_table(part), part.quarantine, part.flaws
        self.entry = ShardEntry(name=part.name, bytes=part.bytes, sha256=part.sha256, count=len(part.samples))
        self.rgb = any(sample.channels == 3 for sample in part.samples)
        self.histogram_CV = np.array(part.histogram) if part.split == "train" else np.zeros((3, 256), np.int64)


@dataclass(frozen=True)
class _Written:
    """The shards, in order."""

    plans: list[ShardPlan]
    parts: list[_Part]
    made: int
    """Number of shards written by this run."""


def _found(config: DataConfig, out: Store) -> Dataset:
    """The finished dataset. ValueError if it was made with other settings or these settings reject it."""
    refuse_drift(config, out)
    dataset = open_dataset(out)
    if has_moved(config, out):
        check_moved(_findable(config), dataset)
    listing = f"`{_listing('quarantine', config, out)}` lists them"
    check_quarantine(config, len(dataset.manifest.quarantine), len(dataset.table), lambda: [listing])
    if config.duplicates.datasets == "refuse":
        refuse_elsewhere(read_report(out))
    return dataset


def _open(config: DataConfig) -> ImageSet:
    """The image set; its notes are logged. ValueError if it has only one class."""
    image_set = open_source(_findable(config))
    for note in image_set.notes:  # logged only: no file name goes into the store
        _log.warning("%s", note)
    if len(image_set.classes) < 2 and image_set.task != "multilabel":
        raise ValueError(
            f"the image set has only one class ({', '.join(image_set.classes)}), but needs at least two; add images "
            "of another class, or check --data.source and the label column"
        )
    return image_set


def _findable(config: DataConfig) -> DataConfig:
    """The config with an absolute source, because tasks may run in another working directory."""
    if not config.source or "://" in config.source:
        return config
    return config.model_copy(update={"source": os.path.abspath(os.path.expanduser(config.source))})


def _remove_abandoned(out: Store) -> None:
    """Deletes old leftovers of killed writers."""
    for key in out.clean(older_than_s=_ABANDONED_S):
        _log.warning("removed the unfinished write of %s by a killed process", key)
    for key in list(out.list(".probe-")):  # a newer one may be in use by another driver
        with contextlib.suppress(StoreKeyError):
            if out.age_s(key) > _ABANDONED_S:
                out.delete(key)


def _remove_strays(plans: Sequence[ShardPlan], out: Store) -> None:
    """Deletes shards left by an unfinished conversion with other settings."""
    planned = {key for plan in plans for key in (tar_key(plan.name), part_key(plan.name))}
    for folder in ("shards/", "parts/"):
        for key in set(out.list(folder)) - planned:
            out.delete(key)


def _contents(written: _Written, image_set: ImageSet, config: DataConfig, listing: str) -> tuple[bytes, Manifest]:
    """Index and manifest. ValueError if too many images, or all of a class in a split, cannot be decoded."""
    import pyarrow as pa

    parts, plans = written.parts, written.plans
    quarantine = tuple(sorted((q for part in parts for q in part.quarantine), key=lambda q: q.key))
    table = pa.concat_tables(part.table for part in parts)
    reasons = {q.key: q.reason for q in quarantine}
    hint = f"`{listing}` lists all of them"
    check_quarantine(config, len(quarantine), len(table), lambda: [*first_named(plans, reasons), hint])
    images = "1 image" if len(quarantine) == 1 else f"{len(quarantine):,} images"
    if quarantine:  # logged only: no file name goes into the store
        _log.warning("quarantined %s: %s; %s", images, "; ".join(first_named(plans, reasons)), hint)
    check_lost_classes(plans, reasons, image_set.classes, hint)
    _log_flaws(parts)
    index = index_bytes(table)
    channels: Literal[1, 3] = 3 if any(part.rgb for part in parts) else 1
    mean, std = channel_statistics(np.sum([part.histogram_CV for part in parts], axis=0)[:channels])
    return index, Manifest(
        dataset=config.dataset,
        task=image_set.task,
        classes=image_set.classes,
        licence=card(config.dataset).licence if config.dataset in names() else "not stated",
        config_sha256=config_digest(config),
        channels=channels,
        mean=mean,
        std=std,
        splits=count_splits(table, image_set.classes),
        shards=tuple(part.entry for part in parts),
        quarantine=quarantine,
        index=IndexEntry(bytes=len(index), sha256=manifest_digest(index)),
    )


def _log_flaws(parts: Sequence[_Part]) -> None:
    flaws: Counter[str] = Counter()
    for part in parts:
        flaws.update(part.flaws)
    if flaws:
        _log.warning(
            "%d images are damaged but lost no pixels and are kept: %s",
            flaws.total(),
            "; ".join(f"{flaw} ({num})" for flaw, num in flaws.most_common()),
        )


def _listing(verb: str, config: DataConfig, out: Store) -> str:
    return listing_command(verb, config.dataset, config.name, out.uri)


def _facts(dataset: Dataset, *, made: int) -> dict[str, Any]:
    manifest, duplicates = dataset.manifest, read_report(dataset.store)
    return {
        "digest": dataset.digest,
        "uri": dataset.store.uri,
        "dataset": manifest.dataset,
        "counts": {split: counts.classes for split, counts in manifest.splits.items()},
        "samples": {split: counts.samples for split, counts in manifest.splits.items()},
        "task": manifest.task,
        "splits_from": splits_from(dataset.store),
        "num_shards": len(manifest.shards),
        "num_images": len(dataset.table),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "quarantine": len(manifest.quarantine),
        "leaks": duplicates.counts,
        "dropped": len(duplicates.dropped),
        "made": made,
        "kept": len(manifest.shards) - made,
    }
