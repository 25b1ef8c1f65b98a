"""The samples of each micro-batch; they depend only on the recipe, the epoch and the rank.

A global batch is cut into micro-batches; rank r of R takes micro-batches r, r + R, ... of every global batch. So the
content of a micro-batch does not depend on the number of ranks, and all ranks get equally many.
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
"""shuffled: each sample once per epoch; balanced: each class equally often, so samples of rare classes repeat."""


@dataclass(frozen=True)
class BatchPlan:
    """How a split is cut into micro-batches, the same for all epochs."""

    split: str
    """train, val or test."""
    batch_size: int
    """Samples per global batch, over all ranks."""
    image_size: int | tuple[int, int]
    """Side, or (height, width), in pixels."""
    train: bool
    """True: shuffled by (seed, epoch), incomplete last global batch dropped. False: in the order of the index, last
    global batch padded (zeros, `mask` False)."""
    micro_batch: int | None = None
    """Samples per micro-batch; None: `batch_size / ranks`."""
    seed: int = 0
    """Seed of the training."""
    sampling: Sampling = "shuffled"
    """How often each sample appears in a training epoch; the length of the epoch is the same."""
    crop: Crop | None = None
    """Take a random crop of each image; None: the complete image."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def of_epoch(self, dataset: Dataset | Mixture, epoch: int, *, start: int, rank: int, ranks: int) -> EpochPlan:
        """The micro-batches of one rank in one epoch, starting at the sample `start`.

        Raises:
            ValueError: the batch cannot be cut evenly, the split is smaller than a training batch, `start` is not
                between two global batches, or balanced sampling is used with multilabel data.
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
                f"{self.batch_size}) can only start between two batches; use a multiple of {self.batch_size} up to "
                f"{num_samples}, such as `consumed` of a micro-batch"
            )

    def _training_order(self, dataset: Dataset | Mixture, epoch: int) -> np.ndarray:
        """As many positions as the split has samples."""
        index = dataset.index(self.split)
        if self.sampling == "balanced":
            if (index.labels.sum(1) != 1).any():
                raise ValueError(
                    "balanced sampling draws by class, but these samples have several classes or none; use 'shuffled'"
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

    `order` has the split's positions in the order of the epoch, with padding as -1; `cuts` has the start of each
    micro-batch in it.
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
        """For each place of `order`, the address of its sample's random numbers."""
        chance: np.ndarray = self.order + visits(self.order) * self.num_in_split
        return chance

    @property
    def left(self) -> np.ndarray:
        """The positions of all micro-batches, without padding."""
        left: np.ndarray = self.order[np.add.outer(np.array(self.cuts, np.int64), np.arange(self.micro_batch))]
        return left[left >= 0]

    def part(self, cut: int) -> slice:
        """The places in `order` of the micro-batch that begins at `cut`."""
        return slice(cut, cut + self.micro_batch)

    def consumed(self, cut: int) -> int:
        """Samples of the epoch up to the end of this micro-batch's global batch."""
        return min((cut // self.batch_size + 1) * self.batch_size, self.num_samples)

    def is_same(self, other: EpochPlan) -> bool:
        """Whether both have the same micro-batches."""
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
            f"the global batch of {batch_size} samples cannot be cut evenly into {cut}; make it a multiple of "
            f"{(micro_batch or 1) * ranks}, or use fewer workers or a smaller micro-batch"
        )
    return micro_batch or batch_size // ranks


def _check_training(num_samples: int, batch_size: int, split: str) -> None:
    if num_samples < batch_size:
        raise ValueError(
            f"the split {split!r} has {num_samples} samples, but a training batch needs {batch_size} and incomplete "
            f"ones are dropped; set the batch size to at most {num_samples}"
        )
