"""The order in which an epoch visits the samples of a split; it depends only on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shuffled(num_samples: int, *seeds: int) -> np.ndarray:
    """A permutation of `range(num_samples)`, int64; `seeds` are seed, epoch and any further distinguishing numbers."""
    # Sorts raw draws, because numpy guarantees their stream, but not that of Generator.permutation.
    draws = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(num_samples)
    return np.argsort(draws, kind="stable")


def mixed(pools: Sequence[np.ndarray], quotas: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """A random order with `quotas[n]` samples of `pools[n]` (positions), int64.

    Each sample of a pool appears once before any repeats; which samples a small quota omits changes by epoch.
    """
    pool_of_place = np.repeat(np.arange(len(pools)), quotas)[shuffled(sum(quotas), seed, epoch, 0)]
    order = np.empty(len(pool_of_place), np.int64)
    for number, (pool, quota) in enumerate(zip(pools, quotas, strict=True)):
        turns = [pool[shuffled(len(pool), seed, epoch, 1, number, turn)] for turn in range(-(-quota // len(pool)))]
        order[pool_of_place == number] = np.concatenate([*turns, pool[:0]])[:quota]
    return order


def even_quotas(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided by weight into integers: each within 1 of its share, with the exact sum."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * total
    quotas = np.floor(shares).astype(np.int64)
    # The largest remainders get the rest; ties go to the first.
    for at in np.argsort(quotas - shares, kind="stable")[: total - quotas.sum()]:
        quotas[at] += 1
    return [int(quota) for quota in quotas]


def padded(num_samples: int, batch: int) -> np.ndarray:
    """`range(num_samples)` padded with -1 to full batches, int64."""
    return np.concatenate([np.arange(num_samples), np.full(-num_samples % batch, -1)]).astype(np.int64)


def visits(order: np.ndarray) -> np.ndarray:
    """For each place, how often its sample appeared earlier in the order, int64; 0 for padding (-1)."""
    by_sample = np.argsort(order, kind="stable")
    ordered = order[by_sample]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else np.empty(0, np.int64)
    runs = np.diff(np.r_[first, len(order)])
    found = np.empty(len(order), np.int64)
    found[by_sample] = np.arange(len(order)) - np.repeat(first, runs)
    found[order < 0] = 0
    return found
