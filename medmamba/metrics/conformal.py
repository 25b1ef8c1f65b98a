"""Split-conformal prediction sets: the classes that cannot be ruled out, with a share of misses fixed beforehand.

Shapes: n samples, C classes. The set of a sample holds every class whose score reaches the class's limit (least
ambiguous sets, Sadinle et al. 2019, doi 10.1080/01621459.2017.1395341). The limit is the score below which a share
`miss` of validation labels lie, with the correction (m + 1) / m for m labels, so that a new label is missed at most as
often if it is exchangeable with those; images of one patient are so only together with the patient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medmamba.metrics.confidence import Estimate
from medmamba.metrics.operating import share
from medmamba.metrics.predictions import Predictions


@dataclass(frozen=True)
class SetRule:
    """How sets are made from scores; `fit_sets` makes one."""

    limits_C: tuple[float, ...]
    """A class is in the set from this score on; 0: always, as validation has too few samples to exclude it."""
    miss: float
    by_class: bool

    def sets(self, scores_nC: np.ndarray) -> np.ndarray:
        """Boolean (n, C): which classes are in the set of each sample. A set may be empty: nothing fits."""
        return np.asarray(np.asarray(scores_nC, dtype=np.float64) >= np.array(self.limits_C))


@dataclass(frozen=True)
class SetFigures:
    """How sets do on samples that the rule was not fitted on."""

    coverage: Estimate
    """Share of labels that are in their set."""
    coverage_by_class: tuple[Estimate, ...]
    mean_size: float
    """Classes per set."""
    empty: Estimate
    """Share of empty sets: nothing fits, an image of another kind."""
    single: Estimate
    """Share of sets with one class: a definite answer."""


def fit_sets(validation: Predictions, *, miss: float = 0.1, by_class: bool = False) -> SetRule:
    """A rule whose sets miss at most a share `miss` of labels; `by_class`: of the labels of each class.

    Multilabel: of the labels that a sample has. Raises ValueError for a share that is not between 0 and 1.
    """
    if not 0 < miss < 1:
        raise ValueError(f"a share of {miss} misses: it must be between 0 and 1")
    scores_nC, truth_nC = validation.scores_nC, validation.truth_nC
    classes = scores_nC.shape[1]
    if by_class:
        limits = [_limit(scores_nC[truth_nC[:, number], number], miss) for number in range(classes)]
    else:
        limits = [_limit(scores_nC[truth_nC], miss)] * classes
    return SetRule(tuple(limits), miss, by_class)


def measure_sets(rule: SetRule, test: Predictions, confidence: float = 0.95) -> SetFigures:
    """Coverage and size of the rule's sets on test samples, intervals by groups."""
    sets_nC = rule.sets(test.scores_nC)
    size_n = sets_nC.sum(1)
    everyone = np.ones(len(test), dtype=bool)
    by_class = tuple(share(test, held, of, confidence) for held, of in zip(sets_nC.T, test.truth_nC.T, strict=True))
    classes = sets_nC.shape[1]
    column = [each.reshape(-1, 1) for each in (test.scores_nC, test.truth_nC, test.guesses_nC)]
    group_m = np.repeat(test.group_n, classes)
    pairs = Predictions("multilabel", column[0], column[1], column[2], group_m, test.num_groups)
    return SetFigures(
        coverage=share(pairs, sets_nC.ravel(), test.truth_nC.ravel(), confidence),
        coverage_by_class=by_class,
        mean_size=float(size_n.mean()),
        empty=share(test, size_n == 0, everyone, confidence),
        single=share(test, size_n == 1, everyone, confidence),
    )


def _limit(score_m: np.ndarray, miss: float) -> float:
    """The largest score that all but a share `miss` of a new label's scores reach; 0 where m is too small to tell."""
    at = int(np.floor(miss * (len(score_m) + 1) + 1e-9))
    return float(np.sort(score_m)[at - 1]) if at >= 1 else 0.0
