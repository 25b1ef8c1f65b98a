"""Which images are small turns and shifts of others: clusters of thumbnails whose centers agree after alignment.

The center of one image is compared with the other's at a grid of angles and offsets. What a sample of the grid does to
a thumbnail, and the cosine transform of it, are one matrix, so that all of them are products of matrices. Frequencies
are weighted by their number, because images of one kind share the low ones. Three steps leave fewer pairs each: a
coarse grid and few frequencies; the fine grid and all frequencies; the cosine between one image and the plane that
the other one spans with its derivatives by angle and offset, which finds the alignment between samples of the grid.
Time grows with the square of the number of images. Scores are floating point: another machine may decide differently
about a pair at the limit. Legend: N images, P pixels of a thumbnail, F frequencies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 32
DEGREES, SHARE = 5.0, 0.05
"""Turns and shifts, as shares of the side, that are searched for."""
# Turned and shifted by as much, the center stays inside of the image.
_CENTER, _SAMPLES = 0.8, 24
_FEW, _ALL = 8, 13  # frequencies in each direction
_LIKE, _LIKELY, _SAME = 0.85, 0.85, 0.98  # least cosines of the three steps
_MOST_CANDIDATES, _BLOCK = 64, 256
Place = tuple[float, float, float]  # degrees, shares of width and height


def shifted_clusters(thumbnails: np.ndarray) -> np.ndarray:
    """The number of its cluster for each of N thumbnails (N, 32, 32) uint8: (N,) int64."""
    num = len(thumbnails)
    pairs = np.array([*_pairs(thumbnails.reshape(num, SIDE * SIDE).astype(np.float32))], np.int64).reshape(-1, 2)
    edges = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(num, num))
    numbers: np.ndarray = connected_components(edges, directed=False)[1].astype(np.int64)
    return numbers


def _pairs(pixels_NP: np.ndarray) -> Iterator[tuple[int, int]]:
    few_NF, all_NF = (_unit(pixels_NP @ _operator((0, 0, 0), num).T) for num in (_FEW, _ALL))
    coarse = [_operator(place, _FEW) for place in _grid(3, 2 / 3)]
    fine = _grid(5, 1)
    operators = np.concatenate([_operator(place, _ALL) for place in fine])
    likely: dict[int, list[tuple[int, int]]] = {}
    for start in range(0, len(pixels_NP), _BLOCK):
        block = pixels_NP[start : start + _BLOCK]
        score = functools.reduce(np.maximum, (_unit(block @ each.T) @ few_NF.T for each in coarse))
        score[np.arange(len(block)), start + np.arange(len(block))] = -1
        probes = _unit((block @ operators.T).reshape(len(block), len(fine), -1))
        for i, others in enumerate(_best(score)):
            cosines = all_NF[others] @ probes[i].T
            for j, place in zip(others.tolist(), cosines.argmax(1).tolist(), strict=True):
                likely.setdefault(place, []).append((start + i, j))
    for place, found in likely.items():
        one, two = np.array(found).T
        for part in np.array_split(np.arange(len(one)), -(-len(one) // 4096)):
            same = _aligned(pixels_NP[one[part]], all_NF[two[part]], fine[place]) >= _SAME
            yield from zip(one[part][same].tolist(), two[part][same].tolist(), strict=True)


def _best(score: np.ndarray) -> Iterator[np.ndarray]:
    """Of each row the positions of its greatest scores, if they are great enough."""
    num = min(_MOST_CANDIDATES, score.shape[1])
    first = np.argpartition(-score, num - 1, axis=1)[:, :num]
    for row, positions in zip(score, first, strict=True):
        yield positions[row[positions] >= _LIKE]


def _aligned(pixels: np.ndarray, others: np.ndarray, place: Place) -> np.ndarray:
    """(n,) cosines between the plane of n images around a place of the grid and n others."""
    steps = ((1.0, 0.0, 0.0), (0.0, 0.01, 0.0), (0.0, 0.0, 0.01))
    planes = [pixels @ _operator(place, _ALL).T]
    for step in steps:
        up, down = (tuple(a + sign * b for a, b in zip(place, step, strict=True)) for sign in (1, -1))
        planes.append(pixels @ (_operator(up, _ALL) - _operator(down, _ALL)).T)
    basis = np.linalg.qr(np.stack(planes, axis=2))[0]
    cosines: np.ndarray = np.linalg.norm(np.einsum("nfa,nf->na", basis, others), axis=1)
    return cosines


def _grid(num: int, extent: float) -> list[Place]:
    """`num` angles and offsets each, up to `extent` of those that are searched for."""
    steps = np.linspace(-extent, extent, num).tolist()
    return [(DEGREES * a, SHARE * x, SHARE * y) for a, x, y in itertools.product(steps, repeat=3)]


def _operator(place: Sequence[float], num: int) -> np.ndarray:
    """(F, P) float32: from pixels to weighted frequencies of the center, turned and shifted; num^2 - 1 of them."""
    angle, (across, down) = np.deg2rad(place[0]), place[1:]
    axis = ((np.arange(_SAMPLES) + 0.5) / _SAMPLES - 0.5) * _CENTER
    x, y = np.meshgrid(axis, axis)
    turned = np.stack([np.cos(angle) * x - np.sin(angle) * y + across, np.sin(angle) * x + np.cos(angle) * y + down])
    at = np.clip((turned + 0.5) * SIDE - 0.5, 0, SIDE - 1.001).reshape(2, -1)
    corner = at.astype(np.int64)
    part = at - corner
    samples = np.arange(_SAMPLES * _SAMPLES)
    columns, weights = [], []
    for right, below in itertools.product((0, 1), repeat=2):
        columns.append((corner[1] + below) * SIDE + corner[0] + right)
        weights.append(np.abs(1 - right - part[0]) * np.abs(1 - below - part[1]))
    places = (np.tile(samples, 4), np.concatenate(columns))
    sampling = coo_array((np.concatenate(weights), places), shape=(len(samples), SIDE * SIDE)).tocsr()
    operator: np.ndarray = (sampling.T @ _frequencies(num).T).T.astype(np.float32)
    return operator


@functools.cache
def _frequencies(num: int) -> np.ndarray:
    """(F, samples): the cosine transform, each frequency weighted by its number."""
    waves = np.cos(np.pi * np.arange(num)[:, None] * (2 * np.arange(_SAMPLES) + 1) / (2 * _SAMPLES))
    weights = np.hypot(*np.mgrid[:num, :num])
    found: np.ndarray = np.einsum("vu,vy,ux->vuyx", weights, waves, waves).reshape(num * num, -1)[1:]
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: np.ndarray = vectors / np.maximum(lengths, 1e-6)
    return found
