"""Scores of one class against the rest -> AUC and average precision, and what each sample contributes to them.

Shapes: n samples, k distinct scores. An influence of a sample is the change of the figure when its weight, 1 of the
sample size, grows: their sum is 0, and the sum of their squares is the figure's variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """The samples by score, ties together; `rank` makes one."""

    truth_n: np.ndarray
    rank_n: np.ndarray
    """Position of a sample's score among the k distinct ones, the smallest first."""
    positives_k: np.ndarray
    negatives_k: np.ndarray

    def auc(self) -> float | None:
        """Probability that a positive outscores a negative, ties counting half; None without one of both."""
        positives, negatives = self.positives_k.sum(), self.negatives_k.sum()
        if not positives or not negatives:
            return None
        below_k = np.cumsum(self.negatives_k) - self.negatives_k / 2
        return float((self.positives_k * below_k).sum() / (positives * negatives))

    def auc_influence(self) -> np.ndarray:
        """The structural components of DeLong et al. (1988), doi 10.2307/2531595, less the AUC, over P or N; (n)."""
        positives, negatives = self.positives_k.sum(), self.negatives_k.sum()
        below_k = (np.cumsum(self.negatives_k) - self.negatives_k / 2) / negatives
        above_k = 1 - (np.cumsum(self.positives_k) - self.positives_k / 2) / positives
        auc = (self.positives_k * below_k).sum() / positives
        of_positive, of_negative = (below_k - auc) / positives, (above_k - auc) / negatives
        moves_n: np.ndarray = np.where(self.truth_n, of_positive[self.rank_n], of_negative[self.rank_n])
        return moves_n

    def average_precision(self) -> float | None:
        """Mean over the positives of the precision at their score; None without positives or negatives."""
        positives = self.positives_k.sum()
        if not positives or not self.negatives_k.sum():
            return None
        return float((self.positives_k * self._precision()).sum() / positives)

    def average_precision_influence(self) -> np.ndarray:
        """Derivative of the average precision by the weight of each sample, over n; (n).

        A sample moves the mean where it is a positive itself, and the precision at every threshold it is above.
        """
        precision_k, positives = self._precision(), self.positives_k.sum()
        mean = (self.positives_k * precision_k).sum() / positives
        per_one_k = self.positives_k / self._guessed()
        gained_k, lost_k = np.cumsum(per_one_k), np.cumsum(per_one_k * precision_k)
        of_positive = precision_k - mean + gained_k - lost_k
        moves_n: np.ndarray = np.where(self.truth_n, of_positive[self.rank_n], -lost_k[self.rank_n]) / positives
        return moves_n

    def _guessed(self) -> np.ndarray:
        """How many samples have at least each score, (k)."""
        return np.cumsum((self.positives_k + self.negatives_k)[::-1])[::-1]

    def _precision(self) -> np.ndarray:
        precision_k: np.ndarray = np.cumsum(self.positives_k[::-1])[::-1] / self._guessed()
        return precision_k


def rank(score_n: np.ndarray, truth_n: np.ndarray) -> Ranking:
    """The samples of one class by score; `truth_n` is boolean."""
    distinct, rank_n = np.unique(score_n, return_inverse=True)
    positives_k = np.bincount(rank_n[truth_n], minlength=len(distinct))
    return Ranking(truth_n, rank_n, positives_k, np.bincount(rank_n, minlength=len(distinct)) - positives_k)
