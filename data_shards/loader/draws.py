"""Random numbers by address: equal for equal (seed, epoch, sample), in any process and order.

SplitMix64 (Steele, Lea, Flood 2014, doi.org/10.1145/2660193.2660195), used as a hash of the address and a counter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_STRIDE = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, epoch: int, sample: np.ndarray, num: int, *, purpose: int) -> np.ndarray:
    """Numbers in [0, 1), float64 (len(sample), num); each `purpose` gives different ones for the same sample."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        state = np.zeros(1, np.uint64)
        for part in (seed, epoch, purpose):
            state = _mixed(state + np.uint64(part % (1 << 64)) + _STRIDE)
        state = _mixed(state + np.asarray(sample).astype(np.uint64) + _STRIDE)
        counter = np.arange(1, num + 1, dtype=np.uint64) * _STRIDE
        return (_mixed(state[:, None] + counter) >> np.uint64(11)) * 2.0**-53


def _mixed(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
