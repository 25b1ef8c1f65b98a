"""Image set -> shards -> index -> manifest, in this order: a dataset with a manifest is whole.

A conversion that was killed is taken up where it stood: shards whose commit mark is there are kept.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data_shards.catalog import card, names
from data_shards.config import DataConfig
from data_shards.manifest import (
    INDEX,
    MANIFEST,
    Dataset,
    IndexEntry,
    Manifest,
    ShardEntry,
    count_splits,
    index_bytes,
    index_table,
    manifest_digest,
    open_dataset,
)
from data_shards.plan import ShardPlan, config_digest, digest_of, plan_shards
from data_shards.shard import ShardPart, find_shard, part_key, tar_key, write_shard
from data_shards.source import ImageSet, open_source
from data_shards.split import assign_splits
from data_shards.store import Store, StoreKeyError, open_store

SETTINGS = "config.json"
_log = logging.getLogger(__name__)

Task = tuple[DataConfig, ShardPlan, str]
RunTasks = Callable[[Callable[[Task], ShardPart], list[Task]], Iterable[ShardPart]]


def convert(
    config: DataConfig,
    out: Store,
    *,
    run_tasks: RunTasks = map,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the dataset of `config` into `out` (rooted at `datasets/<dataset>/<name>`), or finds it there.

    Args:
        config: What to convert.
        out: Where to.
        run_tasks: Like `map`, with results in any order: how `write_one` is run on tasks that can be pickled.
        progress: Called with the number of finished shards and of all shards.

    Returns:
        Facts: digest (the dataset's version), uri, dataset, counts {split: {class: n}}, num_shards, num_images,
        bytes, quarantine (number of images), made and kept (shards written now, shards found).

    Raises:
        ValueError: the store holds a dataset of other settings here, the image set or its splits are at fault, or
            more images than `max_quarantine` cannot be decoded. No manifest is written then.
    """
    if out.head(MANIFEST) is not None:
        _refuse_drift(config, out)
        dataset = open_dataset(out)
        _check_quarantine(config, len(dataset.manifest.quarantine), len(dataset.table), lambda: [])
        return _facts(dataset, made=0)
    settings = json.dumps(_settings(config), indent=1).encode()
    config = _findable(config)
    _source.cache_clear()  # the images may have been mended since this process looked
    image_set = _source(config)
    for note in image_set.notes:  # told here only: no file name goes into the store
        _log.warning("%s", note)
    plans = _plans(image_set, config)
    out.put(SETTINGS, settings)
    found = {plan.name: find_shard(plan, config, out) for plan in plans}
    # A shard that lacks images is made again: they may have been mended since.
    kept = {name: part for name, part in found.items() if part and not part.quarantine}
    tasks = [(config, plan, out.uri) for plan in plans if plan.name not in kept]
    progress(len(kept), len(plans))
    parts = dict(kept)
    for part in run_tasks(write_one, tasks):
        parts[part.name] = part
        progress(len(parts), len(plans))
    _remove_strays(plans, out)
    _commit([parts[plan.name] for plan in plans], plans, image_set, config, out)
    return _facts(open_dataset(out), made=len(tasks))


def write_one(task: Task) -> ShardPart:
    """Writes one shard; opens the image set and the store itself, so that it can run in any process."""
    config, plan, uri = task
    return write_shard(plan, _source(config), config, open_store(uri))


def key_map(config: DataConfig) -> Iterator[tuple[str, str, int]]:
    """(key, path inside the set, frame) of every sample. It is recomputed from the source, as it is never stored."""
    for plan in _plans(open_source(config), config):
        for planned in plan.rows:
            yield planned.key, planned.row.where, planned.row.frame


def _findable(config: DataConfig) -> DataConfig:
    """The config with an absolute source: a task may run in another folder than the one it was asked for in."""
    if not config.source or "://" in config.source:
        return config
    return config.model_copy(update={"source": os.path.abspath(os.path.expanduser(config.source))})


@functools.lru_cache(maxsize=1)
def _source(config: DataConfig) -> ImageSet:
    return open_source(config)


def _plans(image_set: ImageSet, config: DataConfig) -> list[ShardPlan]:
    if len(image_set.classes) < 2 and image_set.task != "multilabel":
        raise ValueError(
            f"the image set has the one class {', '.join(image_set.classes)}: there is nothing to tell apart; add the "
            "images of another class, or check --data.source and the label column"
        )
    splits = assign_splits(
        image_set.rows,
        num_classes=len(image_set.classes),
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        classes=image_set.classes,
    )
    return plan_shards(image_set.rows, splits, config)


def _remove_strays(plans: Sequence[ShardPlan], out: Store) -> None:
    """Deletes shards that an unfinished conversion of other settings left behind."""
    planned = {key for plan in plans for key in (tar_key(plan.name), part_key(plan.name))}
    for folder in ("shards/", "parts/"):
        for key in set(out.list(folder)) - planned:
            out.delete(key)


def _commit(
    parts: Sequence[ShardPart], plans: Sequence[ShardPlan], image_set: ImageSet, config: DataConfig, out: Store
) -> None:
    """Index, then manifest."""
    import pyarrow as pa

    quarantine = tuple(sorted((q for part in parts for q in part.quarantine), key=lambda q: q.key))
    num_images = sum(len(part.samples) for part in parts)
    reasons = {q.key: q.reason for q in quarantine}
    _check_quarantine(config, len(quarantine), num_images, lambda: _named(plans, reasons))
    if quarantine:  # told here only: no file name goes into the store
        _log.warning("%d images set aside: %s", len(quarantine), "; ".join(_named(plans, reasons)))
    table = pa.concat_tables(index_table(part) for part in parts)
    index = index_bytes(table)
    manifest = Manifest(
        dataset=config.dataset,
        task=image_set.task,
        classes=image_set.classes,
        licence=card(config.dataset).licence if config.dataset in names() else "not stated",
        config_sha256=config_digest(config),
        channels=3 if any(sample.channels == 3 for part in parts for sample in part.samples) else 1,
        splits=count_splits(table, image_set.classes),
        shards=tuple(
            ShardEntry(name=part.name, bytes=part.bytes, sha256=part.sha256, count=len(part.samples)) for part in parts
        ),
        quarantine=quarantine,
        index=IndexEntry(bytes=len(index), sha256=manifest_digest(index)),
    )
    out.put(INDEX, index)
    out.put(MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())


def _check_quarantine(config: DataConfig, bad: int, good: int, named: Callable[[], list[str]]) -> None:
    share = bad / max(1, bad + good)
    if share > config.max_quarantine:
        raise ValueError(
            f"{bad} of {bad + good} images ({share:.1%}) cannot be decoded, but max_quarantine allows "
            f"{config.max_quarantine:.1%}: {'; '.join([*named(), 'mend or remove them'])}, or raise "
            "--data.max-quarantine (under another --run)"
        )


def _named(plans: Sequence[ShardPlan], reasons: dict[str, str], most: int = 3) -> list[str]:
    """The first files in quarantine with their reasons, for the owner's eyes only."""
    rows = sorted((p.row.where, reasons[p.key]) for plan in plans for p in plan.rows if p.key in reasons)
    more = [f"and {len(rows) - most} more"] if len(rows) > most else []
    return [f"{where} ({reason})" for where, reason in rows[:most]] + more


def _settings(config: DataConfig) -> dict[str, Any]:
    """The settings as flat dotted keys. The salt only as a digest, for it must not lie beside the keys it hides."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return {**flat, "salt": digest_of(config.salt)[:12] if config.salt else ""}


def _refuse_drift(config: DataConfig, out: Store) -> None:
    """Raises where the finished dataset in the store was made with other settings."""
    wanted = _settings(config)
    try:
        found = json.loads(out.get(SETTINGS))
    except (StoreKeyError, json.JSONDecodeError):
        found = wanted  # only the explanation is lost: the manifest knows the digest of its settings
    ignored = {"name", "max_quarantine"}
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


def _facts(dataset: Dataset, *, made: int) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "digest": dataset.digest,
        "uri": dataset.store.uri,
        "dataset": manifest.dataset,
        "counts": {split: counts.classes for split, counts in manifest.splits.items()},
        "num_shards": len(manifest.shards),
        "num_images": len(dataset.table),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "quarantine": len(manifest.quarantine),
        "made": made,
        "kept": len(manifest.shards) - made,
    }
