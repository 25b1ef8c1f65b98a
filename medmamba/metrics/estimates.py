"""Predictions -> every figure with its interval; two models' predictions -> every difference with its interval.

Groups (patients), not samples, are what is independent: see `influence` and `confidence`.
Shapes: n samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from medmamba.metrics.confidence import (
    PROPORTIONS,
    Estimate,
    interval,
    joint_interval,
    spread_over_classes,
    unseen_share,
)
from medmamba.metrics.figures import FIGURES, JOINT, Figures, disagreement, measure
from medmamba.metrics.influence import Influence, influences
from medmamba.metrics.predictions import Predictions


@dataclass(frozen=True)
class Estimates:
    """The figures of one set of predictions, each with its interval."""

    classes: tuple[Mapping[str, Estimate], ...]
    macro: Mapping[str, Estimate]
    figures: Figures
    """The same without intervals, with support, confusion matrix and the number of classes a macro figure is over."""
    num_samples: int
    num_groups: int


@dataclass(frozen=True)
class Difference:
    """A figure of one model less that of another on the same samples. All is None where either is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    """0 where no group tells the two models apart."""
    freedom: float | None = None
    """Degrees of freedom of the standard error."""
    num_groups: int = 0
    """Independent groups behind the figure."""

    def p_above(self, margin: float) -> float | None:
        """One-sided p of the hypothesis that the difference is `margin` or less; small: it is more.

        Non-inferiority of the first model within 0.02 is `p_above(-0.02) < 0.05`, superiority `p_above(0.0) < 0.05`.
        Of models that no group tells apart it is the probability that a share of `-margin` of groups, on which they
        differ, shows none in the sample. For a figure that is better when small (Brier), exchange the models.
        """
        if self.value is None or self.standard_error is None:
            return None
        if self.standard_error == 0:
            gap = self.value - margin
            return 1.0 if gap <= 0 else float((1 - min(gap, 1.0)) ** self.num_groups)
        return float(stats.t.sf((self.value - margin) / self.standard_error, self.freedom))


@dataclass(frozen=True)
class Differences:
    """Of every figure, per class and of all classes."""

    classes: tuple[Mapping[str, Difference], ...]
    macro: Mapping[str, Difference]
    num_samples: int
    num_groups: int


def estimate(predictions: Predictions, confidence: float = 0.95) -> Estimates:
    """Every figure of `measure` with its interval (7,180 samples of 9 classes: 0.2 s)."""
    figures = measure(predictions)
    found = influences(predictions, figures)
    classes = tuple(
        {name: _estimated(name, values[name], moves.get(name), confidence) for name in FIGURES}
        for values, moves in zip(figures.classes, found.classes, strict=True)
    )
    macro = {name: _macro(name, predictions, figures, found.macro.get(name), classes, confidence) for name in FIGURES}
    return Estimates(classes, macro, figures, len(predictions), predictions.num_groups)


def compare(first: Predictions, second: Predictions, confidence: float = 0.95) -> Differences:
    """Every figure of the first model less that of the second, paired by sample, clustered by group.

    The difference of two influences is the influence of the difference (for the AUC: DeLong's paired test). Raises
    ValueError where the two are not about the same samples: other labels, groups or task.
    """
    same = first.task == second.task and np.array_equal(first.truth_nC, second.truth_nC)
    if not same or not np.array_equal(first.group_n, second.group_n):
        raise ValueError(
            "the predictions are not of the same samples: labels, groups or task differ; evaluate both models on one "
            "manifest and give their predictions in one order"
        )
    one, two = measure(first), measure(second)
    moves_one, moves_two = influences(first, one), influences(second, two)
    pairs = [
        *zip(one.classes, two.classes, moves_one.classes, moves_two.classes, strict=True),
        (one.macro, two.macro, moves_one.macro, moves_two.macro),
    ]
    rows = [
        {name: _difference(a[name], b[name], x.get(name), y.get(name), confidence) for name in FIGURES}
        for a, b, x, y in pairs
    ]
    return Differences(tuple(rows[:-1]), rows[-1], len(first), first.num_groups)


def what_it_can_show(estimates: Estimates, *, images: str = "images", groups: str = "patients") -> str:
    """One sentence on what a sample of this size can tell, by the half width of the AUC's interval."""
    size = f"{estimates.num_samples:,} {images}"
    if estimates.num_groups != estimates.num_samples:
        size += f" of {estimates.num_groups:,} {groups}"
    half_width = estimates.macro["auc"].half_width
    if half_width is None:
        return f"With {size} no AUC can be shown: no class has {images} both with and without it."
    if half_width >= 0.5:
        return f"With {size} no difference in AUC can be distinguished from chance."
    return f"With {size}, a difference in AUC below about {_rounded(half_width)} cannot be distinguished from chance."


def _rounded(value: float) -> str:
    """With one significant digit, from 0.1 on with two; 0.001 at least."""
    value = max(value, 0.001)
    return f"{value:.2f}" if value >= 0.00995 else f"{value:.3f}"


def _estimated(name: str, value: float | None, influence: Influence | None, confidence: float) -> Estimate:
    return Estimate(None) if value is None or influence is None else interval(name, value, influence, confidence)


def _macro(
    name: str,
    predictions: Predictions,
    figures: Figures,
    influence: Influence | None,
    classes: tuple[dict[str, Estimate], ...],
    confidence: float,
) -> Estimate:
    value = figures.macro[name]
    if value is None or influence is None:
        return Estimate(None)
    exclusive = predictions.task != "multilabel"
    if name == "accuracy" and exclusive:
        return interval(name, value, influence, confidence)
    if not influence.is_estimable:
        if name in JOINT and exclusive:
            swing = _swing(predictions, figures)
            return joint_interval(name, value, predictions.num_groups, swing, confidence)
        source = "sensitivity" if name == "balanced_accuracy" and exclusive else name
        return spread_over_classes(value, [each[source] for each in classes])
    # A mean of proportions is not a binomial proportion; the logit suits it as it does the other figures.
    return interval("mean" if name in PROPORTIONS else name, value, influence, confidence)


def _swing(predictions: Predictions, figures: Figures) -> float:
    """How much kappa falls, from 1, for the worst confusion of one more sample: see `joint_interval`."""
    weights = disagreement(predictions)
    shares = np.array(figures.support) / len(predictions)
    return float(weights.max() / (shares @ weights @ shares))


def _difference(
    one: float | None, two: float | None, moves_one: Influence | None, moves_two: Influence | None, confidence: float
) -> Difference:
    if one is None or two is None or moves_one is None or moves_two is None:
        return Difference(None)
    value, groups = one - two, min(moves_one.num_groups, moves_two.num_groups)
    with np.errstate(invalid="ignore"):
        moves = Influence(moves_one.moves_G - moves_two.moves_G, groups, moves_one.num_samples)
    if moves.is_estimable:
        error, freedom = float(np.sqrt(moves.variance)), moves.freedom
        spread = float(stats.t.isf((1 - confidence) / 2, freedom)) * error
        return Difference(value, value - spread, value + spread, error, freedom, groups)
    share = unseen_share(groups, confidence)
    unknown = not np.isfinite(moves.variance)
    return Difference(value, value - share, value + share, None if unknown else 0.0, None, groups)
