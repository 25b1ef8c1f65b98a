"""Predictions -> the figures of a clinical study, for each class and for all, and the confusion matrix.

Shapes: n samples, C classes. A figure that its sample cannot show is None, never NaN or a default:

- sensitivity, precision, F1, average precision, AUC, balanced accuracy, MCC and kappa of a class without positives;
- specificity, AUC, average precision, balanced accuracy, MCC and kappa of a class without negatives;
- precision of a class that was never predicted.

An MCC is 0 where all predictions are the same (as in scikit-learn): such predictions tell nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medmamba.metrics.predictions import Predictions
from medmamba.metrics.ranking import Ranking, rank

FIGURES = (
    "accuracy",
    "balanced_accuracy",
    "auc",
    "average_precision",
    "sensitivity",
    "specificity",
    "precision",
    "f1",
    "mcc",
    "kappa",
    "brier",
)
# Figures of all classes together that are not the mean over the classes.
JOINT = ("accuracy", "mcc", "kappa")

Figure = float | None


@dataclass(frozen=True)
class Figures:
    """The figures of one set of predictions."""

    classes: tuple[Mapping[str, Figure], ...]
    """Per class, one against the rest: each of `FIGURES`."""
    macro: Mapping[str, Figure]
    """Of all classes: each of `FIGURES`, see `measure`."""
    averaged: Mapping[str, int]
    """How many classes a macro figure is the mean of (those where it is defined)."""
    support: tuple[int, ...]
    """Positive samples per class."""
    confusion: np.ndarray
    """Counts, row: label, column: prediction; (C, C), or for multilabel (C, 2, 2), absent before present."""


def measure(predictions: Predictions) -> Figures:
    """Every figure of every class and of all classes.

    A macro figure is the mean over the classes where it is defined. Three are joint in multiclass and ordinal sets:
    accuracy (share of samples predicted right), MCC (R_K, Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006) and
    kappa (Cohen 1968, doi 10.1037/h0026256, quadratic weights for ordinal). Balanced accuracy is then the mean
    sensitivity; per class, and in multilabel sets, it is the mean of sensitivity and specificity. The AUC of two
    exclusive classes is that of class 1. Brier is the mean over classes: Brier's own sum over classes (1950) is C times
    as large.
    """
    rankings = rank_classes(predictions)
    classes = tuple(_of_class(predictions, number, ranking) for number, ranking in enumerate(rankings))
    macro, averaged = _macro(classes, predictions.task)
    matrix = confusion(predictions)
    if predictions.task != "multilabel":
        if len(classes) == 2:
            macro["auc"] = classes[1]["auc"]
        joint = {
            "accuracy": float(np.trace(matrix) / len(predictions)),
            "mcc": correlation(matrix),
            "kappa": agreement(matrix, disagreement(predictions)),
        }
        macro |= joint
        averaged |= {name: int(joint[name] is not None) * len(classes) for name in JOINT}
    return Figures(classes, macro, averaged, tuple(predictions.truth_nC.sum(0).tolist()), matrix)


def rank_classes(predictions: Predictions) -> list[Ranking]:
    """The samples of each class by score."""
    return [rank(*pair) for pair in zip(predictions.scores_nC.T, predictions.truth_nC.T, strict=True)]


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts of labels (rows) and predictions (columns): (C, C), or (C, 2, 2) for multilabel."""
    truth, guesses = (x.astype(np.int64) for x in (predictions.truth_nC, predictions.guesses_nC))
    if predictions.task != "multilabel":
        return truth.T @ guesses
    both, positives, guessed = (truth & guesses).sum(0), truth.sum(0), guesses.sum(0)
    cells = [len(truth) - positives - guessed + both, guessed - both, positives - both, both]
    return np.stack(cells, 1).reshape(-1, 2, 2)


def disagreement(predictions: Predictions) -> np.ndarray:
    """How bad each confusion is, (C, C), as kappa weighs it: 1 off the diagonal, ordinal: the squared distance."""
    at = np.arange(predictions.truth_nC.shape[1])
    apart = at[:, None] - at
    return (apart**2 if predictions.task == "ordinal" else apart != 0).astype(np.float64)


def correlation(matrix: np.ndarray) -> Figure:
    """MCC of a confusion matrix of any size: 0 where one class was always predicted, None where there is only one."""
    labels, guesses, n = (each.astype(np.float64) for each in (matrix.sum(1), matrix.sum(0), matrix.sum()))
    spread_labels, spread_guesses = n**2 - labels @ labels, n**2 - guesses @ guesses
    if spread_labels == 0:
        return None
    if spread_guesses == 0:
        return 0.0
    return float((np.trace(matrix) * n - labels @ guesses) / np.sqrt(spread_labels * spread_guesses))


def agreement(matrix: np.ndarray, weights: np.ndarray) -> Figure:
    """Cohen's kappa of a confusion matrix with these weights of disagreement; None where there is only one class."""
    labels, guesses = matrix.sum(1).astype(np.float64), matrix.sum(0).astype(np.float64)
    expected = labels @ weights @ guesses / matrix.sum()
    if np.count_nonzero(labels) < 2 or expected == 0:
        return None
    return float(1 - (weights * matrix).sum() / expected)


def _of_class(predictions: Predictions, number: int, ranking: Ranking) -> dict[str, Figure]:
    truth, guess = predictions.truth_nC[:, number], predictions.guesses_nC[:, number]
    n, positives, guessed = len(truth), int(truth.sum()), int(guess.sum())
    hits = int((truth & guess).sum())
    matrix = np.array([[n - positives - guessed + hits, guessed - hits], [positives - hits, hits]])
    sensitivity, specificity = _share(hits, positives), _share(int(matrix[0, 0]), n - positives)
    both = 0 < positives < n
    score = predictions.scores_nC[:, number]
    return {
        "accuracy": (n - positives - guessed + 2 * hits) / n,
        "balanced_accuracy": None if sensitivity is None or specificity is None else (sensitivity + specificity) / 2,
        "auc": ranking.auc(),
        "average_precision": ranking.average_precision(),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": _share(hits, guessed) if positives else None,
        "f1": 2 * hits / (positives + guessed) if positives else None,
        "mcc": correlation(matrix) if both else None,
        "kappa": agreement(matrix, 1 - np.eye(2)) if both else None,
        "brier": float(((score - truth) ** 2).mean()),
    }


def _share(part: int, whole: int) -> Figure:
    return part / whole if whole else None


def _macro(classes: tuple[dict[str, Figure], ...], task: str) -> tuple[dict[str, Figure], dict[str, int]]:
    macro: dict[str, Figure] = {}
    averaged = {}
    for name in FIGURES:
        source = "sensitivity" if name == "balanced_accuracy" and task != "multilabel" else name
        values = [value for each in classes if (value := each[source]) is not None]
        macro[name] = float(np.mean(values)) if values else None
        averaged[name] = len(values)
    return macro, averaged
