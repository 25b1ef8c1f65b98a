"""In which order an epoch visits the samples of a split: a function of (seed, epoch) only."""

from __future__ import annotations

import numpy as np


def shuffled(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(num_samples)`, int64."""
    # Sorting raw draws, because numpy promises their stream for ever but not that of Generator.permutation.
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(draws, kind="stable")


def padded(num_samples: int, batch: int) -> np.ndarray:
    """`range(num_samples)` filled up to whole batches with -1, int64."""
    return np.concatenate([np.arange(num_samples), np.full(-num_samples % batch, -1)]).astype(np.int64)


def visits(order: np.ndarray) -> np.ndarray:
    """How often each place's sample came before in the order, int64; padding (-1) counts as never."""
    by_sample = np.argsort(order, kind="stable")
    ordered = order[by_sample]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else np.empty(0, np.int64)
    runs = np.diff(np.r_[first, len(order)])
    found = np.empty(len(order), np.int64)
    found[by_sample] = np.arange(len(order)) - np.repeat(first, runs)
    found[order < 0] = 0
    return found
