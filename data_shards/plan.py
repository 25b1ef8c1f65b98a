"""Rows and their splits -> the rows of each shard, in order. Pure: reads no images and writes nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_shards.rules import RULES
from data_shards.split import SPLITS

if TYPE_CHECKING:
    from data_shards.config import DataConfig
    from data_shards.source.row import Row

# Shared, because json.dumps would build an encoder for each of several hundred thousand keys.
_canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_DEFAULTS = 2  # 2: shards end by size, copies of an image are assigned together
# Bytes of a sample in a tar in addition to its image: three headers, label, JSON and padding.
_OVERHEAD_BYTES = 3072


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row of the source with its key and group as used in the shards."""

    key: str
    group: str
    row: Row


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its name (`train-00000`), its split and its rows in order."""

    name: str
    split: str
    rows: tuple[PlannedRow, ...]


def sample_key(dataset: str, salt: str, where: str, frame: int) -> str:
    """20 hex digits that identify a sample; without the salt they cannot be derived from a guessed file name."""
    return _hex(dataset, salt, where, frame)


def group_key(dataset: str, salt: str, group: str) -> str:
    """20 hex digits that identify a group (patient, smear, ...) of a dataset."""
    return _hex(dataset, salt, group)


def config_digest(config: DataConfig) -> str:
    """sha256 of every setting that affects the bytes; independent of the conversion's name and the source's location.

    Settings at their default are omitted, so that adding a setting does not change the version of older datasets. The
    defaults may therefore change only together with _DEFAULTS (a test checks this).
    """
    return digest_of([_DEFAULTS, config.identity(defaults=False)])


def shard_digest(plan: ShardPlan, config: DataConfig) -> str:
    """sha256 of everything one shard is made from; a resumed conversion keeps shards whose digest matches.

    It includes the source's address, because two npz files have equal keys but different pixels, and the version of
    the conversion rules, which decide what is quarantined.
    """
    rows = [(planned.key, planned.group, planned.row.labels) for planned in plan.rows]
    return digest_of([config_digest(config), config.source, RULES, plan.name, plan.split, rows])


def sample_keys(rows: Sequence[Row], config: DataConfig) -> list[str]:
    """The key of each row. ValueError if two rows are the same image (path and frame)."""
    keys = [sample_key(config.dataset, config.salt, row.where, row.frame) for row in rows]
    if len(set(keys)) < len(keys):
        seen: dict[str, Row] = {}
        for key, row in zip(keys, rows, strict=True):
            if key in seen:
                raise ValueError(
                    f"{row.where!r} (frame {row.frame}) appears twice in the image set, with labels "
                    f"{seen[key].labels} and {row.labels}; list each image only once"
                )
            seen[key] = row
    return keys


def plan_shards(
    rows: Sequence[Row],
    splits: Sequence[str],
    config: DataConfig,
    *,
    keys: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[ShardPlan]:
    """The shards of a dataset: each split is shuffled by `config.seed` and cut into shards of equal counts.

    The order does not depend on the order of the rows, and any prefix of a split's shards is a random sample of it.
    A row without a group is its own group.

    Args:
        rows: The images.
        splits: The split of each row.
        config: Settings of the conversion.
        keys: The keys of the rows, if already computed.
        sizes: Bytes of each row's image; they keep shards below `config.shard_bytes` on average.

    Raises:
        ValueError: two rows are the same image (path and frame).
    """
    planned: dict[str, list[PlannedRow]] = {split: [] for split in SPLITS}
    num_bytes = dict.fromkeys(SPLITS, 0)
    keys = sample_keys(rows, config) if keys is None else keys
    for row, split, key, size in zip(rows, splits, keys, sizes or [0] * len(rows), strict=True):
        group = key if row.group is None else group_key(config.dataset, config.salt, row.group)
        planned[split].append(PlannedRow(key, group, row))
        num_bytes[split] += size + _OVERHEAD_BYTES
    found = []
    for split in SPLITS:
        by_count = -(-len(planned[split]) // config.samples_per_shard)
        num_shards = min(max(by_count, -(-num_bytes[split] // config.shard_bytes)), len(planned[split]))
        found += _cut(split, _shuffled(planned[split], config.seed), num_shards)
    return found


def _shuffled(rows: list[PlannedRow], seed: int) -> list[PlannedRow]:
    # By hash, not by a random generator: stable across library versions and independent of the rows' order.
    return sorted(rows, key=lambda planned: _sha256(f'["order",{seed},"{planned.key}"]')[:20])


def _cut(split: str, rows: list[PlannedRow], num_shards: int) -> list[ShardPlan]:
    ends = [len(rows) * i // num_shards for i in range(num_shards + 1)] if num_shards else []
    return [
        ShardPlan(f"{split}-{i:05d}", split, tuple(rows[start:end]))
        for i, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a value."""
    return _sha256(_canonical_json(value))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hex(*parts: str | int) -> str:
    # As JSON, so that ("a", "bc") and ("ab", "c") differ.
    return digest_of(parts)[:20]
