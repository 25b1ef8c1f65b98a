"""Image set -> shards -> index -> manifest, in this order: a dataset with a manifest is whole.

A conversion that was killed is taken up where it stood: shards whose commit mark is there are kept.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shlex
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from data_shards.catalog import card, names
from data_shards.config import DataConfig
from data_shards.decode import UndecodableImage, decode
from data_shards.leakage import LEAKS, Copy, DuplicatesError, Guarded, guard, lost_text, read_report, refuse_elsewhere
from data_shards.leakage.fingerprint import Fingerprints
from data_shards.leakage.page import LEAKS_PAGE, page
from data_shards.leakage.scan import (
    FINGERPRINTS,
    FOLDER,
    REFUSED,
    Scan,
    chunks,
    fingerprints_bytes,
    kept_if_ended,
    other_datasets,
    scan_chunk,
)
from data_shards.manifest import (
    INDEX,
    MANIFEST,
    Dataset,
    IndexEntry,
    Manifest,
    ShardEntry,
    channel_statistics,
    count_splits,
    index_bytes,
    index_table,
    manifest_digest,
    open_dataset,
)
from data_shards.names import SETTINGS, printable, salt_digest
from data_shards.plan import ShardPlan, config_digest, plan_shards, sample_keys
from data_shards.rules import RULES, RULES_KEY, SPLITS_KEY, changes_since
from data_shards.shard import ShardPart, find_shard, part_key, tar_key, write_shard
from data_shards.source import ImageSet, Row, open_source
from data_shards.split import assign_splits
from data_shards.store import Store, StoreKeyError
from data_shards.store.lease import Lease, one_driver

LEASE = ".lease.json"
_ABANDONED_S = 6 * 3600  # no upload of one shard takes as long
_log = logging.getLogger(__name__)

Task = tuple[DataConfig, ShardPlan, Store]
ScanTask = tuple[DataConfig, int, list[Row], list[str], Store]
RunTasks = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]


def convert(
    config: DataConfig,
    out: Store,
    *,
    run_tasks: RunTasks = map,
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
) -> dict[str, Any]:
    """Writes the dataset of `config` into `out` (rooted at `datasets/<dataset>/<name>`), or finds it there.

    Args:
        config: What to convert.
        out: Where to.
        run_tasks: Like `map`, with results in any order: how `scan_one` and `write_one` are run on tasks that can be
            pickled.
        progress: Called with what is done, of how much, in images while they are looked at, then in shards.

    Returns:
        Facts: digest (the dataset's version), uri, dataset, task, counts {split: {class: n}}, samples {split: n}
        (for multilabel not the sum of the counts), splits_from (a clause, or ""), num_shards, num_images, bytes,
        quarantine (number of images), leaks {what: number of copies}, dropped (number of images), made and kept
        (shards written now, shards found).

    Raises:
        ValueError: the store holds a dataset of other settings here, the image set or its splits are at fault, or
            more images than `max_quarantine` cannot be decoded. No manifest is written then.
        DuplicatesError: an image is in two splits, and the config refuses that. No shard is written then.
    """
    if out.head(MANIFEST) is not None:
        _refuse_drift(config, out)
        _notice_rules(out)
        dataset = open_dataset(out)
        listing = f"`{_command('quarantine', config, out)}` lists them"
        _check_quarantine(config, len(dataset.manifest.quarantine), len(dataset.table), lambda: [listing])
        if config.leaks.datasets == "refuse":
            refuse_elsewhere(read_report(out))
        return _facts(dataset, made=0)
    # Two drivers of the same settings write the same bytes, so they may both work; where a store cannot say who was
    # first, only one does.
    with one_driver(out, LEASE, f"{socket.gethostname()}, process {os.getpid()}") as held:
        settings = {**_settings(config), RULES_KEY: RULES}
        made = _converted(_findable(config), out, _Run(run_tasks, progress, settings, held))
    return _facts(open_dataset(out), made=made)


def _converted(config: DataConfig, out: Store, run: _Run) -> int:
    """Everything up to the manifest; how many shards were written."""
    for key in out.clean(older_than_s=_ABANDONED_S):
        _log.warning("removed what a killed writer left behind of %s", key)
    for key in list(out.list(".probe-")):  # a younger one may be of a driver that looks at the store just now
        with contextlib.suppress(StoreKeyError):
            if out.age_s(key) > _ABANDONED_S:
                out.delete(key)
    _source.cache_clear()  # the images may have been mended since this process looked
    image_set = _source(config)
    settings = json.dumps({**run.settings, SPLITS_KEY: image_set.splits_from}, indent=1).encode()
    for note in image_set.notes:  # told here only: no file name goes into the store
        _log.warning("%s", note)
    _check_classes(image_set)
    keys = sample_keys(image_set.rows, config)
    out.ensure(SETTINGS, settings)
    scan = Scan(image_set, config, out)
    with kept_if_ended(scan, out):
        _look(scan, image_set.rows, config, out, run=run)
        return _write(image_set, keys, scan.prints, config, out=out, run=run, settings=settings)


def _write(
    image_set: ImageSet,
    keys: list[str],
    prints: Fingerprints,
    config: DataConfig,
    *,
    out: Store,
    run: _Run,
    settings: bytes,
) -> int:
    """Everything from the fingerprints to the manifest; how many shards were written."""
    out.delete(REFUSED)  # of an earlier try
    try:
        guarded = _guarded(image_set, keys, prints, config, out)
    except DuplicatesError as refusal:
        out.put(REFUSED, refusal.report.model_dump_json(indent=1).encode())
        told = DuplicatesError(f"{refusal}; `{_command('leaks', config, out)}` lists all duplicates")
        counts = "; ".join(f"{count} {what}" for what, count in refusal.report.counts.items() if count)
        told.public = f"refused because of duplicates: {counts}"
        raise told from None
    chosen = _Chosen(
        [image_set.rows[i] for i in guarded.rows],
        [keys[i] for i in guarded.rows],
        Fingerprints(*(column[guarded.rows] for column in (prints.state, prints.pixels, prints.bits, prints.size))),
    )
    plans = plan_shards(chosen.rows, guarded.splits, config, keys=chosen.keys, sizes=chosen.prints.size.tolist())
    found = {plan.name: find_shard(plan, config, out, image_set=image_set) for plan in plans}
    # A shard that lacks images is made again: they may have been mended since.
    parts = {name: _Part(part) for name, part in found.items() if part and not part.quarantine}
    tasks = [(config, plan, out) for plan in plans if plan.name not in parts]
    run.progress(len(parts), len(plans), "shards")
    for part in run.run_tasks(write_one, tasks):
        parts[part.name] = _Part(part)
        run.progress(len(parts), len(plans), "shards")
    if run.held is not None:
        run.held.check()
    _remove_strays(plans, out)
    _write_report(guarded, chosen, image_set, config, out)
    if not out.holds(SETTINGS, settings):
        raise ValueError(
            f"another conversion with other settings began in {out.uri} while this one ran, and may have replaced its "
            "shards: run again once it has ended, and give one of the two a name of its own with --data.name"
        )
    _commit([parts[plan.name] for plan in plans], plans, image_set, config, out)
    for key in list(out.list(FOLDER)):
        out.delete(key)
    return len(tasks)


def scan_one(task: ScanTask) -> tuple[int, Fingerprints]:
    """Looks at the images of some rows; the task's number and their fingerprints. Runs in any process."""
    config, start, rows, ids, out = task
    return start, scan_chunk(_source(config), rows, ids, max_side=config.max_side, out=out)


def write_one(task: Task) -> ShardPart:
    """Writes one shard; opens the image set itself, so that it can run in any process."""
    config, plan, out = task
    return write_shard(plan, _source(config), config, out)


def key_map(config: DataConfig) -> Iterator[tuple[str, str, int]]:
    """(key, path inside the set, frame) of every sample. It is recomputed from the source, as it is never stored."""
    rows = open_source(config).rows
    for row, key in zip(rows, sample_keys(rows, config), strict=True):
        yield key, row.where, row.frame


class RefusedError(ValueError):
    """A conversion that is refused; `public` says why without the name of any file, for records that others read."""

    def __init__(self, message: str, *, public: str):
        super().__init__(message)
        self.public = public


class _Run(NamedTuple):
    """How a conversion is run; nothing of it decides a byte but `settings`, which are written next to the shards."""

    run_tasks: RunTasks
    progress: Callable[[int, int, str], None]
    settings: dict[str, Any]
    held: Lease | None


class _Chosen(NamedTuple):
    """The rows that go on, with what is known of each."""

    rows: list[Row]
    keys: list[str]
    prints: Fingerprints


def _findable(config: DataConfig) -> DataConfig:
    """The config with an absolute source: a task may run in another folder than the one it was asked for in."""
    if not config.source or "://" in config.source:
        return config
    return config.model_copy(update={"source": os.path.abspath(os.path.expanduser(config.source))})


@functools.lru_cache(maxsize=1)
def _source(config: DataConfig) -> ImageSet:
    return open_source(config)


def _check_classes(image_set: ImageSet) -> None:
    if len(image_set.classes) < 2 and image_set.task != "multilabel":
        raise ValueError(
            f"the image set has the one class {', '.join(image_set.classes)}: there is nothing to tell apart; add the "
            "images of another class, or check --data.source and the label column"
        )


def _look(scan: Scan, rows: Sequence[Row], config: DataConfig, out: Store, *, run: _Run) -> None:
    """Completes the fingerprints: only images that no earlier try has looked at are read."""
    missing = scan.missing
    # With their rows, as a process that finds the rows of DICOM files itself reads the headers of all of them.
    tasks: list[ScanTask] = []
    for start, end in chunks(len(missing)):
        among = missing[start:end].tolist()
        tasks.append((config, start, [rows[i] for i in among], [scan.ids[i] for i in among], out))
    done = len(rows) - len(missing)
    run.progress(done, len(rows), "images")
    for start, part in run.run_tasks(scan_one, tasks):
        scan.add(missing[start : start + len(part)], part)
        done += len(part)
        run.progress(done, len(rows), "images")


def _guarded(image_set: ImageSet, keys: list[str], prints: Fingerprints, config: DataConfig, out: Store) -> Guarded:
    draw = functools.partial(
        assign_splits,
        num_classes=len(image_set.classes),
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        classes=image_set.classes,
    )
    return guard(
        image_set.rows,
        prints,
        config.leaks,
        draw=draw,
        keys=keys,
        classes=image_set.classes,
        official=config.dataset in names() and card(config.dataset).split_policy.startswith("official"),
        others=() if config.leaks.datasets == "off" else other_datasets(out, config.dataset),
    )


def _write_report(guarded: Guarded, chosen: _Chosen, image_set: ImageSet, config: DataConfig, out: Store) -> None:
    """Fingerprints, and the report as JSON and as a page."""
    out.ensure(FINGERPRINTS, fingerprints_bytes(chosen.keys, chosen.rows, guarded.splits, chosen.prints))

    def picture(copy: Copy) -> np.ndarray | None:
        try:
            return None if copy.dataset else decode(image_set.read(image_set.rows[copy.row]))
        except UndecodableImage:
            return None

    title = f"{config.dataset}/{config.name}"
    told = page(guarded.report, title=title, classes=image_set.classes, picture=picture)
    out.ensure(LEAKS, (guarded.report.model_dump_json(indent=1) + "\n").encode())
    out.ensure(LEAKS_PAGE, told.encode())


class _Part:
    """What the driver keeps of a written shard: its samples as columns, for there may be a million."""

    def __init__(self, part: ShardPart):
        self.table, self.quarantine, self.flaws = index_table(part), part.quarantine, part.flaws
        self.entry = ShardEntry(name=part.name, bytes=part.bytes, sha256=part.sha256, count=len(part.samples))
        self.rgb = any(sample.channels == 3 for sample in part.samples)
        self.histogram_CV = np.array(part.histogram) if part.split == "train" else np.zeros((3, 256), np.int64)


def _remove_strays(plans: Sequence[ShardPlan], out: Store) -> None:
    """Deletes shards that an unfinished conversion of other settings left behind."""
    planned = {key for plan in plans for key in (tar_key(plan.name), part_key(plan.name))}
    for folder in ("shards/", "parts/"):
        for key in set(out.list(folder)) - planned:
            out.delete(key)


def _commit(
    parts: Sequence[_Part], plans: Sequence[ShardPlan], image_set: ImageSet, config: DataConfig, out: Store
) -> None:
    """Index, then manifest."""
    import pyarrow as pa

    quarantine = tuple(sorted((q for part in parts for q in part.quarantine), key=lambda q: q.key))
    table = pa.concat_tables(part.table for part in parts)
    reasons = {q.key: q.reason for q in quarantine}
    listing = f"`{_command('quarantine', config, out)}` lists all of them"
    _check_quarantine(config, len(quarantine), len(table), lambda: [*_named(plans, reasons), listing])
    if quarantine:  # reported here only: no file name goes into the store
        _log.warning("%d images quarantined: %s; %s", len(quarantine), "; ".join(_named(plans, reasons)), listing)
    _check_lost_classes(plans, reasons, image_set.classes, listing)
    flaws: Counter[str] = Counter()
    for part in parts:
        flaws.update(part.flaws)
    if flaws:
        _log.warning(
            "%d images are damaged but lost no pixel and are kept: %s",
            flaws.total(),
            "; ".join(f"{flaw} ({num})" for flaw, num in flaws.most_common()),
        )
    index = index_bytes(table)
    channels: Literal[1, 3] = 3 if any(part.rgb for part in parts) else 1
    mean, std = channel_statistics(np.sum([part.histogram_CV for part in parts], axis=0)[:channels])
    manifest = Manifest(
        dataset=config.dataset,
        task=image_set.task,  # type: ignore[arg-type]
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
    data = (manifest.model_dump_json(indent=1) + "\n").encode()
    out.ensure(INDEX, index)
    if not out.put(MANIFEST, data, if_absent=True) and out.get(MANIFEST) != data:
        raise ValueError(
            f"{out.uri} was finished with other settings while this conversion ran: give one of the two a name of its "
            "own with --data.name"
        )


def _check_quarantine(config: DataConfig, bad: int, good: int, named: Callable[[], list[str]]) -> None:
    share = bad / max(1, bad + good)
    if share > config.max_quarantine:
        found = (
            f"{bad} of {bad + good} images ({share:.1%}) cannot be decoded, but max_quarantine allows "
            f"{config.max_quarantine:.1%}"
        )
        raise RefusedError(
            f"{found}: {'; '.join([*named(), 'repair or remove them'])}, or raise --data.max-quarantine", public=found
        )


def _check_lost_classes(
    plans: Sequence[ShardPlan], reasons: dict[str, str], classes: Sequence[str], listing: str
) -> None:
    """ValueError where a class has lost all its images of a split because none of them could be decoded."""
    planned = Counter((plan.split, label) for plan in plans for p in plan.rows for label in p.row.labels)
    bad = Counter(
        (plan.split, label) for plan in plans for p in plan.rows if p.key in reasons for label in p.row.labels
    )
    lost = [home for home, num in sorted(bad.items()) if num == planned[home]]
    if not lost:
        return
    label, homes = lost[0][1], {split for split, other in lost if other == lost[0][1]}
    there = [plan for plan in plans if plan.split in homes]
    keys = {p.key for plan in there for p in plan.rows if label in p.row.labels}
    named = "; ".join(_named(there, {key: reason for key, reason in reasons.items() if key in keys}))
    raise ValueError(
        f"{lost_text(lost, classes)}: none of the {len(keys)} images that {classes[label]!r} had there can be decoded "
        f"({named}), but every split needs every class; repair them, add images of the class, or leave the class out; "
        f"{listing}"
    )


def _command(verb: str, config: DataConfig, out: Store) -> str:
    """The command that lists what this conversion left out, with the names of the files."""
    place = f"/datasets/{config.dataset}/{config.name}"
    store = f" --store {shlex.quote(out.uri.removesuffix(place))}" if out.uri.endswith(place) else ""
    return f"medmamba shards {verb} {config.dataset}/{config.name} --names{store}"


def _named(plans: Sequence[ShardPlan], reasons: dict[str, str], most: int = 3) -> list[str]:
    """The first files in quarantine with their reasons, for the owner's eyes only."""
    rows = sorted((p.row.where, reasons[p.key]) for plan in plans for p in plan.rows if p.key in reasons)
    more = [f"and {len(rows) - most} more"] if len(rows) > most else []
    return [f"{printable(where)} ({printable(reason)})" for where, reason in rows[:most]] + more


def _settings(config: DataConfig) -> dict[str, Any]:
    """The settings as flat dotted keys. The salt only as a digest, for it must not lie beside the keys it hides."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return {**flat, "salt": salt_digest(config.salt)}


def _stored_settings(out: Store) -> dict[str, Any] | None:
    """The settings beside a dataset; None where there are none, or something else."""
    try:
        found = json.loads(out.get(SETTINGS))
    except (StoreKeyError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _refuse_drift(config: DataConfig, out: Store) -> None:
    """Raises where the finished dataset in the store was made with other settings."""
    wanted = _settings(config)
    stored = _stored_settings(out)
    # What was no setting yet when the dataset was made is at its default. Without them only the explanation is lost:
    # the manifest knows the digest of its settings.
    found = wanted if stored is None else {**_settings(DataConfig()), **stored}
    ignored = {"name", "max_quarantine", "leaks.datasets", RULES_KEY, SPLITS_KEY}
    changed = [
        f"data.{key}: {found.get(key)!r} -> {wanted.get(key)!r}"
        for key in sorted(wanted.keys() | found.keys())
        if key not in ignored and found.get(key) != wanted.get(key)
    ]
    if not changed and open_dataset(out).manifest.config_sha256 != config_digest(config):
        changed = ["settings that are no longer on record"]
    if changed:
        raise ValueError(
            f"{out.uri} holds a dataset made with other settings ({'; '.join(changed)}): set them back, or give the "
            "new dataset a name of its own with --data.name"
        )


def _notice_rules(out: Store) -> None:
    """Says what a new conversion of the same images would do differently; the finished dataset stays as it is."""
    changes = changes_since(_stored_settings(out) or {})
    if changes:
        _log.warning(
            "%s was converted by earlier rules and stays valid; a new conversion (--data.name NEW under another --run) "
            "would differ: %s",
            out.uri,
            "; ".join(changes),
        )


def _splits_from(store: Store) -> str:
    """Where the splits of a finished dataset came from; "" where that is not on record."""
    found = (_stored_settings(store) or {}).get(SPLITS_KEY, "")
    return found if isinstance(found, str) else ""


def _facts(dataset: Dataset, *, made: int) -> dict[str, Any]:
    manifest, leaks = dataset.manifest, read_report(dataset.store)
    return {
        "digest": dataset.digest,
        "uri": dataset.store.uri,
        "dataset": manifest.dataset,
        "counts": {split: counts.classes for split, counts in manifest.splits.items()},
        "samples": {split: counts.samples for split, counts in manifest.splits.items()},
        "task": manifest.task,
        "splits_from": _splits_from(dataset.store),
        "num_shards": len(manifest.shards),
        "num_images": len(dataset.table),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "quarantine": len(manifest.quarantine),
        "leaks": leaks.counts,
        "dropped": len(leaks.dropped),
        "made": made,
        "kept": len(manifest.shards) - made,
    }
