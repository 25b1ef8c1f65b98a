"""Which of many fingerprints are equal or nearly so: clusters, in memory that grows with the images, not the pairs.

Fingerprints that differ in at most `most` bits agree entirely in at least one of `most` + 1 bands of bits, so only
those that share a band are compared (Norouzi et al., arXiv 1307.2982). numba, because it is loops over pairs.
"""

# An intrinsic is called without the typing context that it is defined with.
# mypy: disable-error-code="call-arg, var-annotated"

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_shards.duplicates.fingerprint import NUM_BITS, symmetric


def clusters(keys: np.ndarray) -> np.ndarray:
    """Equal rows of (N, w) uint64 get the same number, counted from 0: (N,) int64."""
    whole = np.ascontiguousarray(keys).view([("", keys.dtype)] * keys.shape[1]).ravel()
    numbers: np.ndarray = np.unique(whole, return_inverse=True)[1].reshape(len(keys)).astype(np.int64)
    return numbers


def near_clusters(bits: np.ndarray, *, most: int) -> np.ndarray:
    """The number of its cluster for each of N fingerprints (N, 3) uint64: (N,) int64.

    Two that differ in at most `most` bits share a cluster; so do two that a chain of such pairs leads to.
    """
    same = clusters(bits)
    _, first = np.unique(same, return_index=True)
    distinct = np.ascontiguousarray(bits[first])
    parent = np.arange(len(distinct))
    for band in _bands(most):
        values = _cut(distinct, band)
        if band[1] - band[0] <= 16:
            values = values.astype(np.uint16)  # which numpy sorts by radix, ten times faster
        order = np.argsort(values, kind="stable")
        _join(distinct, values, order, parent, most)
    found: np.ndarray = _roots(parent)[same]
    return found


def turned_clusters(bits: np.ndarray, *, most: int) -> np.ndarray:
    """As `near_clusters`, of fingerprints that differ in at most `most` bits after one of the eight symmetries."""
    num = len(bits)
    images: np.ndarray = np.tile(np.arange(num), 8)
    found = near_clusters(symmetric(bits).reshape(-1, bits.shape[1]), most=most)
    edges = coo_array((np.ones(8 * num, np.int8), (images, num + found)), shape=(9 * num, 9 * num))
    numbers: np.ndarray = connected_components(edges, directed=False)[1][:num].astype(np.int64)
    return numbers


def _bands(most: int) -> list[tuple[int, int]]:
    # Bits of one band are far from each other: the signs of neighboring frequencies are similar.
    ends = [NUM_BITS * i // (most + 1) for i in range(most + 2)]
    return list(itertools.pairwise(ends))


def _cut(bits: np.ndarray, band: tuple[int, int]) -> np.ndarray:
    """Bits [start, end) of each fingerprint, in an order that spreads frequencies over bands, as integers."""
    values = np.zeros(len(bits), np.uint64)
    for place, position in enumerate(range(*band)):
        bit = position * 71 % NUM_BITS  # 71 and 168 share no factor: each bit is in one band
        values |= ((bits[:, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)) << np.uint64(place % 64)
    return values


@intrinsic
def _ones(typing: Any, value: Any) -> Any:
    """How many bits of a uint64 are 1."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), code


@njit(cache=True)
def _join(bits: np.ndarray, values: np.ndarray, order: np.ndarray, parent: np.ndarray, most: int) -> None:
    """Unites the clusters of all pairs with equal `values` and a distance of at most `most`."""
    num = len(order)
    start = 0
    while start < num:
        end = start + 1
        while end < num and values[order[end]] == values[order[start]]:
            end += 1
        for i in range(start, end):
            a = order[i]
            a0, a1, a2 = bits[a, 0], bits[a, 1], bits[a, 2]
            for j in range(i + 1, end):
                b = order[j]
                distance = _ones(a0 ^ bits[b, 0])
                if distance > most:
                    continue
                distance += _ones(a1 ^ bits[b, 1])
                if distance > most:
                    continue
                distance += _ones(a2 ^ bits[b, 2])
                if distance <= most:
                    _unite(parent, a, b)
        start = end


@njit(cache=True)
def _unite(parent: np.ndarray, a: int, b: int) -> None:
    while parent[a] != a:
        parent[a] = parent[parent[a]]
        a = parent[a]
    while parent[b] != b:
        parent[b] = parent[parent[b]]
        b = parent[b]
    if a < b:
        parent[b] = a
    else:
        parent[a] = b


@njit(cache=True)
def _roots(parent: np.ndarray) -> np.ndarray:
    roots = np.empty_like(parent)
    for i in range(len(parent)):
        root = i
        while parent[root] != root:
            root = parent[root]
        roots[i] = root
    return roots
