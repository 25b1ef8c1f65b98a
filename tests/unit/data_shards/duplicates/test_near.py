"""Clusters of fingerprints that differ in few bits, against comparing every pair."""

from __future__ import annotations

import numpy as np
import pytest

from data_shards.duplicates.fingerprint import NUM_BITS
from data_shards.duplicates.near import clusters, near_clusters


def random_bits(num: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**63, (num, 3), dtype=np.uint64) * 2 + rng.integers(0, 2, (num, 3), dtype=np.uint64)
    bits[:, 2] &= np.uint64(2 ** (NUM_BITS - 128) - 1)
    return bits


def flipped(bits: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    found = bits.copy()
    for position in rng.choice(NUM_BITS, num, replace=False).tolist():
        found[position // 64] ^= np.uint64(1 << position % 64)
    return found


def by_comparing_all_pairs(bits: np.ndarray, most: int) -> np.ndarray:
    home = np.arange(len(bits))
    for i in range(len(bits)):
        for j in range(i):
            near = sum(int(a ^ b).bit_count() for a, b in zip(bits[i], bits[j], strict=True)) <= most
            if near and home[i] != home[j]:
                home[home == home[i]] = home[j]
    return home


def same_partition(one: np.ndarray, two: np.ndarray) -> bool:
    pairs = set(zip(one.tolist(), two.tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 12, 20, 24])
def test_the_clusters_are_those_of_comparing_all_pairs(most):
    rng = np.random.default_rng(most)
    base = random_bits(40, seed=most)
    copies = [flipped(base[i % 40], d, rng) for i, d in enumerate(rng.integers(0, 27, 120).tolist())]
    bits = np.concatenate([base, copies, base[:5]])
    found = near_clusters(bits, most=most)
    assert same_partition(found, by_comparing_all_pairs(bits, most))
    assert len(np.unique(found)) < len(bits)


def test_a_pair_at_the_limit_is_always_found_and_beyond_never():
    rng = np.random.default_rng(1)
    for base in random_bits(200, seed=9):
        near, far = flipped(base, 12, rng), flipped(base, 13, rng)
        assert len(set(near_clusters(np.stack([base, near]), most=12))) == 1
        assert len(set(near_clusters(np.stack([base, far]), most=12))) == 2


def test_a_chain_of_near_pairs_is_one_cluster():
    rng = np.random.default_rng(2)
    chain = [random_bits(1)[0]]
    for _ in range(30):
        chain.append(flipped(chain[-1], 10, rng))
    assert len(set(near_clusters(np.stack(chain), most=12))) == 1


def test_equal_rows_have_one_number():
    keys = random_bits(6)[[0, 1, 0, 2, 1, 0]]
    found = clusters(keys)
    assert found[0] == found[2] == found[5]
    assert found[1] == found[4]
    assert len(set(found.tolist())) == 3


def test_no_images_have_no_clusters():
    assert near_clusters(random_bits(0), most=12).shape == (0,)
