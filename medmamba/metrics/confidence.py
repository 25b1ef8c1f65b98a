"""A figure and its influences -> its interval, by the method whose coverage is best for that figure.

Measured by tests/bench/interval_coverage.py on clustered sets with AUC 0.88 and 0.99:

- proportions: exact binomial limits (Clopper and Pearson) with the effective sample size that clustering leaves (Korn
  and Graubard 1998, Survey Methodology 24:193);
- AUC and average precision: t on the logit, with the logit's bias added on the side of chance;
- MCC and kappa: t on Fisher's z; the other figures: t on the logit;
- where the variance is 0 or unknown (perfect or constant predictions, a single group): the values that a share of
  groups could give which the sample misses with a probability of 2.5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from medmamba.metrics.influence import LEAST_ERROR, Influence

PROPORTIONS = ("accuracy", "sensitivity", "specificity", "precision")
SIGNED = ("mcc", "kappa")  # from -1 on; the others from 0
RANKED = ("auc", "average_precision")


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval. Everything is None where the figure is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    """None where the sample gives none: perfect or constant predictions, a single group."""
    freedom: float | None = None
    """Degrees of freedom of the standard error."""
    method: str = "none"
    """binomial, logit, fisher, or exact."""

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def interval(name: str, value: float, influence: Influence, confidence: float = 0.95) -> Estimate:
    """The figure `name`, one of `FIGURES`, with its interval.

    A proportion needs no influence of its own name: any mean of zeros and ones is passed as "accuracy".
    """
    tail = (1 - confidence) / 2
    if not influence.is_estimable:
        if name in PROPORTIONS:
            low, high = clopper_pearson(value * influence.num_groups, influence.num_groups, confidence)
        else:
            low, high = _unseen(name, value, influence.num_groups, tail)
        return Estimate(value, low, high, method="exact")
    variance, freedom = influence.variance, influence.freedom
    error = float(np.sqrt(variance))
    t = float(stats.t.isf(tail, freedom))
    if name in PROPORTIONS:
        size = min(influence.num_samples, value * (1 - value) / variance * (stats.norm.isf(tail) / t) ** 2)
        return Estimate(value, *clopper_pearson(value * size, size, confidence), error, freedom, "binomial")
    if not _lowest(name) < value < 1:
        return Estimate(value, *_unseen(name, value, influence.num_groups, tail), error, freedom, "exact")
    if name in SIGNED:
        at, spread = np.arctanh(value), t * error / (1 - value**2)
        return Estimate(value, float(np.tanh(at - spread)), float(np.tanh(at + spread)), error, freedom, "fisher")
    at, logit_error = special.logit(value), error / (value * (1 - value))
    # A logit of a mean is too far from 0: second term of its expansion. Without it an AUC of 0.99 with 30 groups is
    # covered in 92.9 %.
    bias = (2 * value - 1) * logit_error**2 / 2 if name in RANKED else 0.0
    low = special.expit(at - t * logit_error - max(0.0, bias))
    high = special.expit(at + t * logit_error - min(0.0, bias))
    return Estimate(value, float(low), float(high), error, freedom, "logit")


def clopper_pearson(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Exact limits of a binomial proportion (1934, doi 10.1093/biomet/26.4.404); neither number need be whole."""
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = float(stats.beta.ppf(tail, successes, failures + 1)) if successes > 0 else 0.0
    high = float(stats.beta.isf(tail, successes + 1, failures)) if failures > 0 else 1.0
    return low, high


def spread_over_classes(value: float, classes: list[Estimate]) -> Estimate:
    """A macro figure whose own variance is 0 or unknown: between the means of the classes' limits."""
    lows = [each.low for each in classes if each.low is not None]
    highs = [each.high for each in classes if each.high is not None]
    return Estimate(value, float(np.mean(lows)), float(np.mean(highs)), method="exact")


def unseen_share(num_groups: int, confidence: float = 0.95) -> float:
    """The largest share of groups of another kind of which `num_groups` show none with a probability of 2.5 %."""
    return float(1 - ((1 - confidence) / 2) ** (1 / num_groups))


def joint_interval(name: str, value: float, num_groups: int, swing: float, confidence: float = 0.95) -> Estimate:
    """As `interval`, of an MCC or kappa of several classes without a variance.

    `swing`: how much the figure falls for each sample, as a share, that a perfect prediction gets wrong.
    """
    share = min(1.0, unseen_share(num_groups, confidence) * swing)
    if value >= 1 - LEAST_ERROR:
        return Estimate(value, 1 - share, 1.0, method="exact")
    reach = np.sqrt(share) if name == "mcc" else min(1.0, 2 * share)
    return Estimate(value, max(-1.0, value - reach), min(1.0, value + reach), method="exact")


def _unseen(name: str, value: float, num_groups: int, tail: float) -> tuple[float, float]:
    """How far the figure could move if `unseen_share` of the groups on the smaller side were predicted wrongly.

    Of a perfect figure that is at most the share itself, but for the average precision: negatives above all positives
    cost share * log(1 + 1 / share). Of others, two figures rise faster: F1 by twice the share, MCC by its root.
    """
    share = unseen_share(num_groups, 1 - 2 * tail)
    reach = max(share, share * np.log1p(1 / share)) if name == "average_precision" else share
    if value < 1 - LEAST_ERROR:
        reach = np.sqrt(share) if name == "mcc" else min(1.0, 2 * reach)
    return float(max(_lowest(name), value - reach)), float(min(1.0, value + reach))


def _lowest(name: str) -> float:
    return -1.0 if name in SIGNED else 0.0
