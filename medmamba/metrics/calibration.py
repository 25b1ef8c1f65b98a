"""Do probabilities mean what they say? Calibration error, reliability curve, and the temperature that corrects a model.

Shapes: n samples, C classes, b bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from medmamba.metrics.confidence import Estimate, interval
from medmamba.metrics.influence import mean_influence
from medmamba.metrics.predictions import Predictions

BINS = 15
LEAST_PER_BIN = 30
_DRAWS = 4000
_TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Bin:
    """Samples of like confidence."""

    confidence: float
    """Their mean."""
    observed: Estimate
    """How many of them were right (of a class: were of it), with its interval."""
    count: int


@dataclass(frozen=True)
class Calibration:
    """How far confidence is from what is observed."""

    error: Estimate
    """The expected calibration error: mean distance of confidence and observed share over the bins, debiased."""
    plain_error: float
    """The same without the correction, as it is usually reported: above 0 also for a perfectly calibrated model."""
    curve: tuple[Bin, ...]
    """The reliability curve, least confident bin first."""


def calibration(
    predictions: Predictions, number: int | None = None, *, bins: int | None = None, confidence: float = 0.95
) -> Calibration:
    """Calibration of the predicted class, or of the probability of class `number`.

    Bins hold equally many samples, ties staying together: there may be fewer than `bins`. By default 15, and fewer
    where a bin would have less than 30 samples. Without `number`, the confidence is the largest score and the outcome
    whether it is right; multilabel: all scores of all labels. The noise of a bin's share makes its distance larger
    (Kumar et al. 2019, arXiv 1909.10155): the debiased error is the one whose expected plain error is the observed one,
    with gaps of the observed pattern. Its interval is by groups. Raises ValueError for fewer than one bin.
    """
    confidence_m, outcome_m, group_m = _pairs(predictions, number)
    bins = max(1, min(BINS, len(confidence_m) // LEAST_PER_BIN)) if bins is None else bins
    if bins < 1:
        raise ValueError(f"{bins} bins: there must be at least one")
    bin_m = _equal_mass(confidence_m, bins)
    num_bins = int(bin_m.max()) + 1
    count_b = np.bincount(bin_m, minlength=num_bins)
    mean_b = np.bincount(bin_m, weights=confidence_m) / count_b
    share_b = np.bincount(bin_m, weights=outcome_m) / count_b
    moves_Gb = np.zeros((predictions.num_groups, num_bins))
    gap_m = (outcome_m - confidence_m) - (share_b - mean_b)[bin_m]
    np.add.at(moves_Gb, (group_m, bin_m), gap_m / count_b[bin_m])
    influences = [mean_influence(outcome_m, bin_m == at, group_m, predictions.num_groups) for at in range(num_bins)]
    curve = tuple(
        Bin(float(mean_b[at]), interval("accuracy", float(share_b[at]), influences[at], confidence), int(count_b[at]))
        for at in range(num_bins)
    )
    weight_b = count_b / count_b.sum()
    return Calibration(*_error(share_b - mean_b, moves_Gb, weight_b, confidence), curve)


def _pairs(predictions: Predictions, number: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, outcome and group of everything that is binned."""
    scores_nC, truth_nC = predictions.scores_nC, predictions.truth_nC
    if number is not None:
        return scores_nC[:, number], truth_nC[:, number].astype(np.float64), predictions.group_n
    if predictions.task == "multilabel":
        group_m = np.repeat(predictions.group_n, scores_nC.shape[1])
        return scores_nC.ravel(), truth_nC.ravel().astype(np.float64), group_m
    right_n = (truth_nC & predictions.guesses_nC).any(1)
    return scores_nC.max(1), right_n.astype(np.float64), predictions.group_n


def _equal_mass(confidence_m: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each sample, from 0 on without gaps."""
    edges = np.quantile(confidence_m, np.arange(1, bins) / bins)
    return np.unique(np.searchsorted(edges, confidence_m, side="right"), return_inverse=True)[1]


def _error(gap_b: np.ndarray, moves_Gb: np.ndarray, weight_b: np.ndarray, confidence: float) -> tuple[Estimate, float]:
    """The debiased error with its interval, and the plain one.

    The noise of the gaps is normal, its covariance by groups, and as much larger as t is than the normal for the groups
    of a bin. The lower limit is the error of gaps of the observed pattern, so small that a plain error as observed or
    more has a probability of 2.5 %. The upper limit is 1.96 standard errors above the plain error, which is on average
    no smaller than the true one.
    """
    groups_b = np.maximum(2, np.count_nonzero(moves_Gb, axis=0))
    moves_Gb = moves_Gb * np.sqrt(groups_b / (groups_b - 1))
    covariance = moves_Gb.T @ moves_Gb
    plain = float(weight_b @ np.abs(gap_b))
    factor = _share_of_gaps(np.abs(gap_b), np.maximum(np.sqrt(np.diag(covariance)), 1e-12), weight_b)
    value = factor * plain
    noise = np.random.default_rng(0).multivariate_normal(np.zeros(len(gap_b)), covariance, _DRAWS, method="eigh")
    tail = (1 - confidence) / 2
    noise *= stats.t.isf(tail, np.median(groups_b) - 1) / stats.norm.isf(tail)
    low = plain * _factor_at(plain, gap_b, noise, weight_b, 1 - tail)
    error = float((np.abs(gap_b + noise) @ weight_b).std())
    high = plain + float(stats.norm.isf(tail)) * error
    return Estimate(value, min(low, value), min(1.0, max(high, value)), error, method="inverted"), plain


def _factor_at(plain: float, gap_b: np.ndarray, noise: np.ndarray, weight_b: np.ndarray, part: float) -> float:
    """The factor of the gaps at which the quantile `part` of the plain error is the observed one; 0 where none is."""

    def excess(factor: float) -> float:
        return float(np.quantile(np.abs(factor * gap_b + noise) @ weight_b, part)) - plain

    if plain == 0 or excess(0.0) >= 0:
        return 0.0
    most = 2.0
    while excess(most) < 0 and most < 1000:
        most *= 2
    return float(optimize.brentq(excess, 0.0, most, xtol=1e-4))


def _share_of_gaps(gap_b: np.ndarray, spread_b: np.ndarray, weight_b: np.ndarray) -> float:
    """The factor in [0, 1] which makes gaps so small that, with their noise, their mean size is the observed one."""

    def excess(factor: float) -> float:
        ratio_b = factor * gap_b / spread_b
        # The mean of a folded normal (Leone et al. 1961, doi 10.1080/00401706.1961.10489974).
        tail_b = np.sqrt(2 / np.pi) * np.exp(-(ratio_b**2) / 2)
        return float(weight_b @ (spread_b * (tail_b + ratio_b * special.erf(ratio_b / np.sqrt(2))) - gap_b))

    if excess(0.0) >= 0:
        return 0.0
    return 1.0 if excess(1.0) <= 0 else float(optimize.brentq(excess, 0.0, 1.0))


def log_scores(scores_nC: np.ndarray, task: str) -> np.ndarray:
    """Logits (n, C) that give these probabilities: their logarithms, for multilabel the log-odds.

    Probabilities that rounding made 0 or 1 count as the last number before that in the type of `scores_nC`, so float32
    scores are passed as such.
    """
    scores = np.asarray(scores_nC)
    kind = np.finfo(scores.dtype)
    likely = np.maximum(scores.astype(np.float64), float(kind.tiny))
    if task != "multilabel":
        return np.asarray(np.log(likely))
    unlikely = np.maximum(1 - scores.astype(np.float64), float(kind.epsneg) / 2)
    return np.asarray(np.log(likely) - np.log(unlikely))


def with_temperature(logits_nC: np.ndarray, temperature: float, task: str) -> np.ndarray:
    """Probabilities (n, C), float64, of the logits divided by the temperature; above 1 is less confident.

    Predicted classes stay the same (multilabel: at the threshold 0.5), and so does the order of samples by the score of
    a label or of one of two classes, hence their AUC. With more than two exclusive classes the order of two samples by
    the score of one class may change, as it also depends on the scores of the others.
    """
    scaled = np.asarray(logits_nC, dtype=np.float64) / temperature
    return np.asarray(special.expit(scaled) if task == "multilabel" else special.softmax(scaled, axis=1))


def negative_log_likelihood(logits_nC: np.ndarray, labels_nC: np.ndarray, task: str, temperature: float = 1.0) -> float:
    """Mean over samples of -log of the probability of the label, in nats; multilabel: mean over samples and labels."""
    scaled, labels = np.asarray(logits_nC, dtype=np.float64) / temperature, np.asarray(labels_nC, dtype=bool)
    if task == "multilabel":
        return float(np.logaddexp(0, np.where(labels, -scaled, scaled)).mean())
    return float(-special.log_softmax(scaled, axis=1)[labels].mean())


def fit_temperature(logits_nC: np.ndarray, labels_nC: np.ndarray, task: str) -> float:
    """The temperature with the smallest negative log-likelihood on validation samples, between 0.05 and 20.

    Guo et al. (2017, arXiv 1706.04599). The likelihood has one optimum, being concave in 1 / temperature. `logits_nC`
    are the network's, or those of `log_scores`. Raises ValueError without samples.
    """
    if not len(logits_nC):
        raise ValueError("no validation samples: a temperature needs some; check the split")
    found = optimize.minimize_scalar(
        lambda inverse: negative_log_likelihood(logits_nC, labels_nC, task, 1 / inverse),
        bounds=(1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0]),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(1 / found.x)
