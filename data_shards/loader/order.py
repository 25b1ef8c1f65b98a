"""In which order an epoch visits the samples of a split: a function of (seed, epoch) only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shuffled(num_samples: int, *seeds: int) -> np.ndarray:
    """A permutation of `range(num_samples)`, int64; `seeds` are seed, epoch, and whatever else tells it from others."""
    # Sorting raw draws, because numpy promises their stream for ever but not that of Generator.permutation.
    draws = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(num_samples)
    return np.argsort(draws, kind="stable")


def mixed(pools: Sequence[np.ndarray], quotas: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """An order in which `quotas[n]` places, scattered at random, hold samples of `pools[n]` (positions), int64.

    Within a pool every sample comes once before one comes again; what a small quota leaves out changes by epoch.
    """
    pool_of_place = np.repeat(np.arange(len(pools)), quotas)[shuffled(sum(quotas), seed, epoch, 0)]
    order = np.empty(len(pool_of_place), np.int64)
    for number, (pool, quota) in enumerate(zip(pools, quotas, strict=True)):
        turns = [pool[shuffled(len(pool), seed, epoch, 1, number, turn)] for turn in range(-(-quota // len(pool)))]
        order[pool_of_place == number] = np.concatenate([*turns, pool[:0]])[:quota]
    return order


def even_quotas(total: int, weights: Sequence[float]) -> list[int]:
    """`total` shared out by weight in whole numbers: each within 1 of its share, their sum exact."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * total
    quotas = np.floor(shares).astype(np.int64)
    # The greatest remainders get the rest; of equal ones the first.
    for at in np.argsort(quotas - shares, kind="stable")[: total - quotas.sum()]:
        quotas[at] += 1
    return quotas.tolist()


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
