"""Scores, labels and groups of the same samples, checked once for all figures.

Shapes: n samples, C classes, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmamba.metrics.classification import checked_arrays, predicted_labels

_ROUNDING = 1e-6  # a float32 softmax may exceed 1
Groups = Sequence[str | None]


@dataclass(frozen=True)
class Predictions:
    """What a model said about n samples; `checked_predictions` makes one."""

    task: str
    scores_nC: np.ndarray
    """Probabilities, float64."""
    truth_nC: np.ndarray
    """Labels, boolean."""
    guesses_nC: np.ndarray
    """Predicted labels, boolean: the class with the largest score; multilabel: each from 0.5 on."""
    group_n: np.ndarray
    """The group of each sample as a number below `num_groups`."""
    num_groups: int

    def __len__(self) -> int:
        return len(self.scores_nC)

    def rows(self, at: np.ndarray) -> Predictions:
        """The same for some of the samples: `at` is a mask or positions, (m)."""
        kept, group_m = np.unique(self.group_n[at], return_inverse=True)
        arrays = (self.scores_nC[at], self.truth_nC[at], self.guesses_nC[at])
        return Predictions(self.task, *arrays, group_m, len(kept))


def checked_predictions(
    scores_nC: np.ndarray, labels_nC: np.ndarray, task: str, groups: Groups | None = None
) -> Predictions:
    """The arguments as one value. A sample whose group is None or empty is a group of its own.

    Args:
        scores_nC: Probabilities (n, C), finite; multiclass and ordinal: one row sums to 1.
        labels_nC: 0 or 1 (n, C), exactly one 1 per sample unless multilabel. Classes may be absent.
        task: multiclass, ordinal or multilabel.
        groups: n names, for instance of patients; None: each sample is a group.

    Raises:
        ValueError: shapes, scores or labels that do not fit, or no samples at all.
    """
    scores, truth = checked_arrays(scores_nC, labels_nC, task)
    if not len(scores):
        raise ValueError("no samples to measure; check the split")
    if scores.min() < 0 or scores.max() > 1 + _ROUNDING:
        raise ValueError(f"scores are between {scores.min():.3g} and {scores.max():.3g}: they must be probabilities")
    group_n, num_groups = number_groups(groups, len(scores))
    return Predictions(task, scores, truth, predicted_labels(scores, task), group_n, num_groups)


def number_groups(groups: Groups | None, num_samples: int) -> tuple[np.ndarray, int]:
    """The group of each sample as a number (n), in order of first appearance, and how many groups there are."""
    if groups is None:
        return np.arange(num_samples), num_samples
    if len(groups) != num_samples:
        raise ValueError(f"{len(groups)} groups of {num_samples} samples: there must be one per sample, or None")
    numbers: dict[object, int] = {}
    found = [numbers.setdefault(group or (row,), len(numbers)) for row, group in enumerate(groups)]
    return np.array(found), len(numbers)
