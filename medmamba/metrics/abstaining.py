"""Which images not to answer for: risk against coverage, and a score that says an image is of another kind.

Shapes: n samples, C classes, k distinct confidences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from medmamba.metrics.predictions import Predictions


@dataclass(frozen=True)
class RiskCurve:
    """Error among the answered samples as fewer are answered, the most confident first."""

    confidence_k: np.ndarray
    """Answer from this confidence on; descending."""
    coverage_k: np.ndarray
    """Share of samples that are answered."""
    risk_k: np.ndarray
    """Share of wrong answers among them (multilabel: of wrong labels)."""
    area: float
    """Mean risk over all coverages (AURC, Geifman et al. 2019, arXiv 1805.08206): small is good."""
    excess: float
    """The area above that of a confidence which ranks every error last."""


def risk_curve(predictions: Predictions) -> RiskCurve:
    """Risk and coverage by confidence, samples of equal confidence together.

    The confidence is the largest score; for multilabel the mean over labels of the larger of score and 1 - score.
    """
    confidence_n, wrong_n = confidences(predictions), _wrong(predictions)
    distinct, at_n = np.unique(-confidence_n, return_inverse=True)
    count_k = np.bincount(at_n)
    wrong_k = np.bincount(at_n, weights=wrong_n)
    answered_k = np.cumsum(count_k)
    risk_k = np.cumsum(wrong_k) / answered_k
    # Within a tie samples come in any order: each has the mean error of the tie.
    area = _area((wrong_k / count_k)[np.sort(at_n)])
    best = _area(np.sort(wrong_n))
    return RiskCurve(-distinct, answered_k / len(wrong_n), risk_k, area, area - best)


def confidences(predictions: Predictions) -> np.ndarray:
    """How sure the model is of each answer, (n), in [0, 1]."""
    scores = predictions.scores_nC
    if predictions.task == "multilabel":
        return np.asarray(np.maximum(scores, 1 - scores).mean(1))
    return np.asarray(scores.max(1))


def choose_confidence(validation: Predictions, risk: float) -> float | None:
    """The confidence from which on answers have at most this risk on validation, answering as many as that allows.

    None where no confidence does: the model should not answer at all.
    """
    curve = risk_curve(validation)
    good = np.flatnonzero(curve.risk_k <= risk)
    return float(curve.confidence_k[good[-1]]) if good.size else None


def energy(logits_nC: np.ndarray, task: str) -> np.ndarray:
    """How foreign each image is, (n): large where no class has evidence.

    The energy, less the logarithm of the sum of exponents (Liu et al. 2020, arXiv 2010.03759); for multilabel the sum
    over labels of -log(1 + exp(logit)) (Wang et al. 2021, arXiv 2109.14162). It needs logits: probabilities no longer
    hold their sum. Temperature is not applied.
    """
    logits = np.asarray(logits_nC, dtype=np.float64)
    found = -np.logaddexp(0, logits).sum(1) if task == "multilabel" else -special.logsumexp(logits, axis=1)
    return np.asarray(found)


def energy_limit(validation_energy_n: np.ndarray, flagged: float = 0.05) -> float:
    """The energy above which an image counts as foreign: that share of validation images is above it.

    No foreign images are needed, so how many of them it finds is not known. Raises ValueError without samples or for a
    share that is not between 0 and 1.
    """
    if not len(validation_energy_n) or not 0 < flagged < 1:
        raise ValueError(
            f"{len(validation_energy_n)} samples, share {flagged}: needs samples, and a share between 0 and 1"
        )
    return float(np.quantile(validation_energy_n, 1 - flagged, method="higher"))


def _wrong(predictions: Predictions) -> np.ndarray:
    if predictions.task == "multilabel":
        return np.asarray((predictions.truth_nC != predictions.guesses_nC).mean(1))
    return np.asarray(~(predictions.truth_nC & predictions.guesses_nC).any(1), dtype=np.float64)


def _area(error_n: np.ndarray) -> float:
    return float((np.cumsum(error_n) / np.arange(1, len(error_n) + 1)).mean())
