"""Predictions on images of patients whose true figures are known, for tests of intervals."""

from __future__ import annotations

import functools

import numpy as np
from scipy import optimize, stats

from medmamba.metrics.figures import Figures, measure
from medmamba.metrics.predictions import Predictions, checked_predictions

PRIORS = {2: np.array([0.7, 0.3]), 3: np.array([0.5, 0.3, 0.2])}
LABEL_SHARE, SCORE_SHARE = 0.4, 0.3  # of the variance behind labels and scores that a patient's images have in common


def draw(rng: np.random.Generator, num_samples: int, num_groups: int, classes: int, strength: float) -> Predictions:
    """Calibrated predictions of an ordinal set with two or three classes; every group has an image at least.

    Score and label of an image have a part that all images of its group share. `strength`: the distance between the
    means of a class and the rest, in standard deviations.
    """
    return draw_models(rng, num_samples, num_groups, classes, (strength,))[0]


def draw_models(
    rng: np.random.Generator,
    num_samples: int,
    num_groups: int,
    classes: int,
    strengths: tuple[float, ...],
    correlation: float = 0.0,
) -> list[Predictions]:
    """As `draw`, of several models on the same images, the noise of two of them correlated."""
    group_n = np.concatenate([np.arange(num_groups), rng.integers(num_groups, size=num_samples - num_groups)])
    names = None if num_groups == num_samples else [f"patient {number}" for number in group_n]

    def shared(share: float, columns: int) -> np.ndarray:
        of_group = rng.normal(size=(num_groups, columns))[group_n]
        return np.sqrt(share) * of_group + np.sqrt(1 - share) * rng.normal(size=(num_samples, columns))

    edges = stats.norm.ppf(np.cumsum(PRIORS[classes])[:-1])
    labels = np.eye(classes, dtype=np.int64)[np.searchsorted(edges, shared(LABEL_SHARE, 1)[:, 0])]
    columns = 1 if classes == 2 else classes
    common = shared(SCORE_SHARE, columns) if len(strengths) > 1 else 0.0
    found = []
    for strength in strengths:
        noise = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * shared(SCORE_SHARE, columns)
        score = strength * labels[:, -columns:] + noise
        evidence = strength * score
        if classes == 2:
            evidence = np.concatenate([np.zeros_like(score), strength * score - strength**2 / 2], axis=1)
        odds = np.exp(evidence - evidence.max(1, keepdims=True)) * PRIORS[classes]
        found.append(checked_predictions(odds / odds.sum(1, keepdims=True), labels, "ordinal", names))
    return found


@functools.cache
def strength_of(classes: int, auc: float) -> float:
    """The strength at which the macro AUC is `auc`."""
    if classes == 2:
        return float(np.sqrt(2) * stats.norm.ppf(auc))
    return float(
        optimize.brentq(lambda strength: _true(classes, strength, 200_000).macro["auc"] - auc, 0.3, 8, xtol=1e-3)
    )


@functools.cache
def true_figures(classes: int, auc: float, num_samples: int = 2_000_000) -> Figures:
    """The figures of a sample so large that its error is a few percent of any interval tested here."""
    return _true(classes, strength_of(classes, auc), num_samples)


def _true(classes: int, strength: float, num_samples: int) -> Figures:
    return measure(draw(np.random.default_rng(2), num_samples, num_samples, classes, strength))
