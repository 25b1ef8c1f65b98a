"""Which samples each micro-batch holds: a function of the recipe, the epoch and the rank, and of nothing else.

A global batch is cut into micro-batches; rank r of R takes micro-batches r, r + R, ... of every global batch. What a
micro-batch holds therefore does not depend on the number of ranks, and every rank gets equally many.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_shards.loader.mixture import Mixture
from data_shards.loader.order import even_quotas, mixed, padded, shuffled, visits
from data_shards.loader.pixels import Crop
from data_shards.manifest import Dataset

Sampling = Literal["shuffled", "balanced"]
"""shuffled: each sample once an epoch; balanced: each class equally often, samples of rare classes several times."""


@dataclass(frozen=True)
class BatchPlan:
    """How a split is cut into micro-batches, the same for all epochs."""

    split: str
    """train, val or test."""
    batch_size: int
    """Samples of a global batch, over all ranks."""
    image_size: int | tuple[int, int]
    """Side, or (height, width), in pixels."""
    train: bool
    """Shuffled from (seed, epoch), the incomplete last global batch dropped; else in the order of the index, the last
    global batch padded (zeros, `mask` False)."""
    micro_batch: int | None = None
    """Samples of a micro-batch; None: `batch_size / ranks`."""
    seed: int = 0
    """Of the whole training."""
    sampling: Sampling = "shuffled"
    """How often each sample comes in a training epoch; its length is the same."""
    crop: Crop | None = None
    """Take a random part of each image instead of stretching the whole."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def of_epoch(self, dataset: Dataset | Mixture, epoch: int, *, start: int, rank: int, ranks: int) -> EpochPlan:
        """The micro-batches of one rank in one epoch, from the sample `start` on.

        Raises:
            ValueError: the batch cannot be cut evenly, no training batch fits, `start` is not between two global
                batches, or classes of a multilabel dataset are to be balanced.
        """
        num_in_split = len(dataset.index(self.split))
        micro_batch = _micro_batch(self.batch_size, self.micro_batch, ranks)
        if self.train:
            _check_training(num_in_split, self.batch_size, self.split)
            order = self._training_order(dataset, epoch)[: num_in_split // self.batch_size * self.batch_size]
        else:
            order = padded(num_in_split, self.batch_size)
        num_samples = len(order) if self.train else num_in_split
        self._check_start(start, num_samples)
        cuts = [
            first + cut
            for first in range(len(order) if start == num_samples else start, len(order), self.batch_size)
            for cut in range(rank * micro_batch, self.batch_size, ranks * micro_batch)
        ]
        return EpochPlan(order, tuple(cuts), num_in_split, num_samples, self.batch_size, micro_batch, self.seed, epoch)

    def _check_start(self, start: int, num_samples: int) -> None:
        if not (0 <= start <= num_samples and (start % self.batch_size == 0 or start == num_samples)):
            raise ValueError(
                f"start is {start}, but an epoch of {self.split!r} ({num_samples} samples in batches of "
                f"{self.batch_size}) can only be entered between two batches: give a multiple of {self.batch_size} up "
                f"to {num_samples}, as `consumed` has it"
            )

    def _training_order(self, dataset: Dataset | Mixture, epoch: int) -> np.ndarray:
        """As many positions as the split has samples."""
        index = dataset.index(self.split)
        if self.sampling == "balanced":
            if (index.labels.sum(1) != 1).any():
                raise ValueError(
                    "balanced sampling draws by class, but these samples have several classes or none: use 'shuffled'"
                )
            pools = [np.flatnonzero(index.labels[:, number]) for number in range(index.labels.shape[1])]
            pools = [pool for pool in pools if len(pool)]
            return mixed(pools, even_quotas(len(index), [1] * len(pools)), self.seed, epoch)
        if isinstance(dataset, Mixture) and dataset.weights is not None:
            quotas = even_quotas(len(index), dataset.weights)
            return mixed(dataset.members(self.split), quotas, self.seed, epoch)
        return shuffled(len(index), self.seed, epoch)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The micro-batches of one rank in one epoch.

    `order` holds the split's positions from the first sample to the last of the epoch, padding as -1; `cuts`, where in
    it each micro-batch begins.
    """

    order: np.ndarray
    cuts: tuple[int, ...]
    num_in_split: int
    num_samples: int
    batch_size: int
    micro_batch: int
    seed: int
    epoch: int

    @functools.cached_property
    def chance(self) -> np.ndarray:
        """For each place of `order` which random numbers are its sample's."""
        return self.order + visits(self.order) * self.num_in_split

    @property
    def left(self) -> np.ndarray:
        """The positions of all micro-batches, without padding."""
        left = self.order[np.add.outer(np.array(self.cuts, np.int64), np.arange(self.micro_batch))]
        return left[left >= 0]

    def part(self, cut: int) -> slice:
        """The places in `order` of the micro-batch that begins at `cut`."""
        return slice(cut, cut + self.micro_batch)

    def consumed(self, cut: int) -> int:
        """Samples of the epoch done once the global batch of this micro-batch is done."""
        return min((cut // self.batch_size + 1) * self.batch_size, self.num_samples)

    def is_same(self, other: EpochPlan) -> bool:
        """Whether both hold the same micro-batches."""
        names = ("cuts", "batch_size", "micro_batch", "seed", "epoch")
        return np.array_equal(self.order, other.order) and all(
            getattr(self, name) == getattr(other, name) for name in names
        )


def _micro_batch(batch_size: int, micro_batch: int | None, ranks: int) -> int:
    if batch_size < 1 or (micro_batch is not None and micro_batch < 1):
        raise ValueError(f"batch_size {batch_size} and micro_batch {micro_batch} must each be at least 1")
    if batch_size % ((micro_batch or 1) * ranks):
        cut = f"{ranks} ranks" if micro_batch is None else f"{ranks} ranks x micro-batches of {micro_batch}"
        raise ValueError(
            f"the global batch of {batch_size} samples cannot be cut evenly into {cut}: make it a multiple of "
            f"{(micro_batch or 1) * ranks}, or use fewer workers or a smaller micro-batch"
        )
    return micro_batch or batch_size // ranks


def _check_training(num_samples: int, batch_size: int, split: str) -> None:
    if num_samples < batch_size:
        raise ValueError(
            f"the split {split!r} holds {num_samples} samples, but a training batch takes {batch_size} and an "
            f"incomplete one is dropped: make the batch at most {num_samples}"
        )
