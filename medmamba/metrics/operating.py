"""Operating points of one class: thresholds chosen on validation, figures at a threshold, and the decision curve.

Shapes: n samples, t thresholds. A sample is called positive where its score reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from medmamba.metrics.confidence import Estimate, interval
from medmamba.metrics.influence import mean_influence
from medmamba.metrics.predictions import Predictions


@dataclass(frozen=True)
class OperatingPoint:
    """What one threshold of one class gives; a share of no samples is an Estimate of None."""

    threshold: float
    sensitivity: Estimate
    specificity: Estimate
    precision: Estimate
    """Share of the samples called positive that are (positive predictive value)."""
    negative_value: Estimate
    """Share of the samples called negative that are (negative predictive value)."""
    flagged: Estimate
    """Share of samples called positive."""


def choose_threshold(
    validation: Predictions, number: int, *, sensitivity: float | None = None, specificity: float | None = None
) -> float:
    """The threshold for class `number` that reaches one wanted share on validation and costs least of the other.

    Exactly one of the two is given, in (0, 1]. For a sensitivity it is the largest score that keeps enough positives;
    for a specificity the smallest that keeps enough negatives below (above all scores where none does: 1 and a bit).
    Raises ValueError for a share out of range, and where validation has no sample to count.
    """
    if (sensitivity is None) == (specificity is None):
        raise ValueError("give either a sensitivity or a specificity to reach")
    wanted = sensitivity if sensitivity is not None else specificity
    if wanted is None or not 0 < wanted <= 1:
        raise ValueError(f"a share of {wanted} cannot be reached: it must be above 0 and at most 1")
    score_n, truth_n = validation.scores_nC[:, number], validation.truth_nC[:, number]
    counted = np.sort(score_n[truth_n if sensitivity is not None else ~truth_n])
    if not len(counted):
        kind = "positive" if sensitivity is not None else "negative"
        raise ValueError(
            f"class {number} has no {kind} validation sample: a threshold cannot be chosen; check the split"
        )
    # A whole number that rounding lifts by 1e-16 stays what it is.
    needed = int(np.ceil(wanted * len(counted) - 1e-9))
    if sensitivity is not None:
        return float(counted[len(counted) - needed])
    return float(np.nextafter(counted[needed - 1], np.inf))


def at_threshold(test: Predictions, number: int, threshold: float, confidence: float = 0.95) -> OperatingPoint:
    """The figures of class `number` on test samples at a threshold that was chosen on others."""
    truth_n, called_n = test.truth_nC[:, number], test.scores_nC[:, number] >= threshold
    everyone = np.ones(len(test), dtype=bool)
    shares = (
        (called_n, truth_n),
        (~called_n, ~truth_n),
        (truth_n, called_n),
        (~truth_n, ~called_n),
        (called_n, everyone),
    )
    return OperatingPoint(float(threshold), *(share(test, value, of, confidence) for value, of in shares))


def share(predictions: Predictions, value_n: np.ndarray, of_n: np.ndarray, confidence: float = 0.95) -> Estimate:
    """How many of the samples `of_n` (n, boolean) have `value_n` (n, boolean), with its interval by groups."""
    if not of_n.any():
        return Estimate(None)
    influence = mean_influence(value_n, of_n, predictions.group_n, predictions.num_groups)
    return interval("accuracy", float(value_n[of_n].mean()), influence, confidence)


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit of acting on the model, on everybody, and (0) on nobody."""

    thresholds_t: np.ndarray
    """Probability from which one would act, in (0, 1)."""
    model_t: np.ndarray
    """True positives less weighted false positives, per sample."""
    low_t: np.ndarray
    high_t: np.ndarray
    treat_all_t: np.ndarray


def decision_curve(
    predictions: Predictions, number: int, thresholds: Sequence[float] | None = None, confidence: float = 0.95
) -> DecisionCurve:
    """Decision curve of class `number` (Vickers and Elkin 2006, doi 10.1177/0272989X06295361).

    A false positive weighs threshold / (1 - threshold) of a true one. Scores must be calibrated for the threshold to be
    a probability. Intervals are t on the plain scale, by groups. By default 99 thresholds, 0.01 to 0.99. Raises
    ValueError for a threshold that is not between 0 and 1.
    """
    given = np.arange(1, 100) / 100 if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    if not ((given > 0) & (given < 1)).all():
        raise ValueError("thresholds of a decision curve must be between 0 and 1, both excluded")
    truth_n, score_n = predictions.truth_nC[:, number], predictions.scores_nC[:, number]
    everyone = np.ones(len(predictions), dtype=bool)
    rows = []
    for threshold in given:
        weight = threshold / (1 - threshold)
        gain_n = np.where(truth_n, 1.0, -weight)
        benefit_n = gain_n * (score_n >= threshold)
        influence = mean_influence(benefit_n, everyone, predictions.group_n, predictions.num_groups)
        spread = np.nan
        if influence.is_estimable:
            spread = stats.t.isf((1 - confidence) / 2, influence.freedom) * np.sqrt(influence.variance)
        value = benefit_n.mean()
        rows.append((value, value - spread, value + spread, gain_n.mean()))
    return DecisionCurve(given, *np.array(rows).T)
