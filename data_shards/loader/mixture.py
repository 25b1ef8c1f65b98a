"""Several datasets read as one: classes by name, places of an epoch by weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.manifest import Dataset, ShardEntry, SplitIndex
from data_shards.store import Store


@dataclass(frozen=True, eq=False)
class Mixture:
    """What a Loader takes in a dataset's place.

    Classes of the same name are one class. `weights` share out the places of a training epoch, which has as many as
    all datasets have samples; None: each sample once. Evaluation takes each sample once in any case.
    """

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...] | None

    @property
    def classes(self) -> tuple[str, ...]:
        """All class names, in the order in which the datasets bring them."""
        return tuple(dict.fromkeys(name for dataset in self.datasets for name in dataset.manifest.classes))

    @property
    def shards(self) -> list[tuple[Store, ShardEntry]]:
        """The shards of all datasets, one after the other."""
        return [(dataset.store, shard) for dataset in self.datasets for shard in dataset.manifest.shards]

    @property
    def channels(self) -> int:
        """3 if any dataset has colour: grey images are then repeated."""
        return max(dataset.manifest.channels for dataset in self.datasets)

    def index(self, split: str) -> SplitIndex:
        """The samples of a split of all datasets, one after the other; labels by `classes`, shards by `shards`."""
        return self._indexes(split)[0]

    def members(self, split: str) -> list[np.ndarray]:
        """The positions in `index` of each dataset's samples."""
        return self._indexes(split)[1]

    @functools.cached_property
    def _indexes(self):
        return functools.cache(self._joined)

    def _joined(self, split: str) -> tuple[SplitIndex, list[np.ndarray]]:
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
        ValueError: there is none, their tasks do not fit, or the weights are not one positive number each.
    """
    tasks = {dataset.manifest.task for dataset in datasets}
    grades = {dataset.manifest.classes for dataset in datasets if dataset.manifest.task == "ordinal"}
    if len(tasks) != 1 or len(grades) > 1:
        raise ValueError(
            f"a mixture of {len(datasets)} datasets of the tasks {sorted(tasks)}: it needs at least one, all of one "
            "task, and ordinal ones must have the same grades; leave out those that differ"
        )
    if weights is not None and (len(weights) != len(datasets) or not all(weight > 0 for weight in weights)):
        raise ValueError(
            f"weights {tuple(weights)} for {len(datasets)} datasets: give each a positive number, and leave out the "
            "dataset that shall not take part"
        )
    return Mixture(tuple(datasets), None if weights is None else tuple(float(weight) for weight in weights))
