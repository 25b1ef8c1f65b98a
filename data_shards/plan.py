"""Rows with their splits -> which shard holds which row, in which order. Pure: reads no image and writes nothing."""

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

# One encoder for all: json.dumps would build one for each of several hundred thousand keys.
_canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_DEFAULTS = 2  # 2: shards end by size, copies of an image are dealt out together
# What a sample takes in a tar beside its image: three headers, its label and JSON, and what fills up the blocks.
_OVERHEAD_BYTES = 3072


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row of the source under the names that the shards know it by."""

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
    """20 hex digits that name a sample; without the salt they cannot be found from a guessed file name."""
    return _hex(dataset, salt, where, frame)


def group_key(dataset: str, salt: str, group: str) -> str:
    """20 hex digits that name a group (patient, smear, ...) of a dataset."""
    return _hex(dataset, salt, group)


def config_digest(config: DataConfig) -> str:
    """sha256 of every setting that decides the bytes, whatever the conversion is called and wherever its source is.

    Settings at their default are left out, so that a setting added later does not move the version of datasets made
    before. The defaults themselves may therefore change only together with _DEFAULTS (a test holds them).
    """
    return digest_of([_DEFAULTS, config.identity(defaults=False)])


def shard_digest(plan: ShardPlan, config: DataConfig) -> str:
    """sha256 of all that one shard is made from, by which a resumed conversion knows a shard that it need not make.

    The source's address is part of it: keys of two npz files are the same, their pixels are not. So is the number of
    the rules of conversion, which decide what is quarantined.
    """
    rows = [(planned.key, planned.group, planned.row.labels) for planned in plan.rows]
    return digest_of([config_digest(config), config.source, RULES, plan.name, plan.split, rows])


def sample_keys(rows: Sequence[Row], config: DataConfig) -> list[str]:
    """The key of each row. ValueError where two rows are the same image (path and frame)."""
    keys = [sample_key(config.dataset, config.salt, row.where, row.frame) for row in rows]
    if len(set(keys)) < len(keys):
        seen: dict[str, Row] = {}
        for key, row in zip(keys, rows, strict=True):
            if key in seen:
                raise ValueError(
                    f"{row.where!r} (frame {row.frame}) stands twice in the image set, with labels "
                    f"{seen[key].labels} and {row.labels}: each image may be listed once"
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
    """The shards of a dataset, split by split, each shuffled from `config.seed` and cut into parts of equal counts.

    The order does not depend on that of the rows, and any prefix of a split's shards is a fair sample of it.
    A row without a group is a group of its own. `keys`: those of the rows, where they are known already; `sizes`: bytes
    of each row's image, by which shards stay below `config.shard_bytes` on average.

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
    # By hash rather than by a random generator: stable over library versions and blind to the rows' order.
    return sorted(rows, key=lambda planned: _sha256(f'["order",{seed},"{planned.key}"]')[:20])


def _cut(split: str, rows: list[PlannedRow], num_shards: int) -> list[ShardPlan]:
    ends = [len(rows) * i // num_shards for i in range(num_shards + 1)] if num_shards else []
    return [
        ShardPlan(f"{split}-{i:05d}", split, tuple(rows[start:end]))
        for i, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value in its one canonical spelling."""
    return _sha256(_canonical_json(value))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hex(*parts: str | int) -> str:
    # As JSON, so that ("a", "bc") and ("ab", "c") differ.
    return digest_of(parts)[:20]
