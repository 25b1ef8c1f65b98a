"""Several datasets read as one: classes are matched by name, samples of an epoch are divided by weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.index import SplitIndex
from data_shards.manifest import Dataset, ShardEntry
from data_shards.store import Store


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several datasets, for use in a Loader like a single one.

    Classes with equal names are one class. `weights` divide the samples of a training epoch, whose length is the number
    of samples of all datasets; None: each sample once. Evaluation always uses each sample once.
    """

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...] | None

    @property
    def classes(self) -> tuple[str, ...]:
        """All class names, in order of first appearance."""
        return tuple(dict.fromkeys(name for dataset in self.datasets for name in dataset.manifest.classes))

    @property
    def shards(self) -> list[tuple[Store, ShardEntry]]:
        """The shards of all datasets, concatenated."""
        return [(dataset.store, shard) for dataset in self.datasets for shard in dataset.manifest.shards]

    @property
    def channels(self) -> int:
        """3 if any dataset is RGB, in which gray images are repeated; else 1."""
        return max(dataset.manifest.channels for dataset in self.datasets)

    def index(self, split: str) -> SplitIndex:
        """The samples of a split of all datasets, concatenated; labels follow `classes`, shards follow `shards`."""
        return self._joined(split)[0]

    def members(self, split: str) -> list[np.ndarray]:
        """The positions in `index` of each dataset's samples."""
        return self._joined(split)[1]

    @functools.cached_property
    def _known(self) -> dict[str, tuple[SplitIndex, list[np.ndarray]]]:
        return {}

    def _joined(self, split: str) -> tuple[SplitIndex, list[np.ndarray]]:
        if split not in self._known:
            self._known[split] = self._join(split)
        return self._known[split]

    def _join(self, split: str) -> tuple[SplitIndex, list[np.ndarray]]:
        parts, members, shards_before, samples_before = [], [], 0, 0
        for dataset in self.datasets:
            index = dataset.index(split)
            labels = np.zeros((len(index), len(self.classes)), np.uint8)
            labels[:, [self.classes.index(name) for name in dataset.manifest.classes]] = index.labels
            parts.append(dataclasses.replace(index, labels=labels, shard=index.shard + shards_before))
            members.append(np.arange(samples_before, samples_before + len(index)))
            shards_before += len(dataset.manifest.shards)
            samples_before += len(index)
        columns = [field.name for field in dataclasses.fields(SplitIndex)]
        return SplitIndex(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns}
        ), members


def mix(datasets: Sequence[Dataset], weights: Sequence[float] | None = None) -> Mixture:
    """The datasets as one.

    Raises:
        ValueError: no datasets are given, their tasks differ, or the weights are not one positive number each.
    """
    tasks = {dataset.manifest.task for dataset in datasets}
    grades = {dataset.manifest.classes for dataset in datasets if dataset.manifest.task == "ordinal"}
    if len(tasks) != 1 or len(grades) > 1:
        raise ValueError(
            f"a mixture of {len(datasets)} datasets with the tasks {sorted(tasks)} is not possible: it needs at least "
            "one dataset, all of the same task, and equal grades if ordinal; leave out those that differ"
        )
    if weights is not None and (len(weights) != len(datasets) or not all(weight > 0 for weight in weights)):
        raise ValueError(
            f"weights {tuple(weights)} for {len(datasets)} datasets: give each a positive number, or leave out "
            "unwanted datasets"
        )
    return Mixture(tuple(datasets), None if weights is None else tuple(float(weight) for weight in weights))
