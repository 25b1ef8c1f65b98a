"""Predictions -> how much each group moves each figure: the common ground of intervals and of comparisons.

The influence of a sample is the derivative of a figure by the sample's weight (the infinitesimal jackknife, Efron
1982, doi 10.1137/1.9781611970319), summed over a group; the sum of squares over groups is the variance of the figure,
robust against any dependence within groups. For the AUC of independent samples this is DeLong's variance exactly, for
clustered ones Obuchowski's (1997, doi 10.2307/2533958) up to the weights of small samples.
Shapes: n samples, C classes, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from medmamba.metrics.figures import FIGURES, Figures, disagreement, rank_classes
from medmamba.metrics.predictions import Predictions
from medmamba.metrics.ranking import Ranking

LEAST_ERROR = 1e-9  # a standard error below it is rounding


@dataclass(frozen=True)
class Influence:
    """What the groups contribute to one figure."""

    moves_G: np.ndarray
    """Change of the figure by each group, scaled so that the sum of squares is an unbiased variance."""
    num_groups: int
    """Independent groups behind the figure: of a sensitivity those with positives, of an AUC the rarer side's."""
    num_samples: int
    """Samples that the figure is a mean over, where it is one."""

    @property
    def variance(self) -> float:
        """Of the figure; not finite where one side of it has a single group."""
        return float(self.moves_G @ self.moves_G)

    @property
    def is_estimable(self) -> bool:
        """Whether the sample shows a variance: neither 0 nor unknown (a single group)."""
        return bool(np.isfinite(self.variance) and self.variance > LEAST_ERROR**2)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the variance, by its own variance (Pan and Wall 2002, doi 10.1002/sim.1142).

        Few groups with a large influence, as the errors of a good model are, give few: between 2 and num_groups - 1.
        """
        squares_G = self.moves_G**2
        total = squares_G.sum()
        spread = squares_G @ squares_G - total**2 / len(squares_G)
        most = max(1.0, float(self.num_groups - 1))
        return most if spread <= 0 else float(min(most, 2 * total**2 / spread))


@dataclass(frozen=True)
class Influences:
    """Of every figure that is defined: per class and of all classes."""

    classes: tuple[Mapping[str, Influence], ...]
    macro: Mapping[str, Influence]


def influences(predictions: Predictions, figures: Figures) -> Influences:
    """The influences behind `figures`, which are those of `measure(predictions)`."""
    rankings = rank_classes(predictions)
    classes = tuple(_of_class(predictions, figures, number, rankings[number]) for number in range(len(rankings)))
    exclusive = predictions.task != "multilabel"
    macro = {}
    for name in FIGURES:
        source = "sensitivity" if name == "balanced_accuracy" and exclusive else name
        if found := [each[source] for each in classes if source in each]:
            moves_G = np.mean([each.moves_G for each in found], axis=0)
            macro[name] = Influence(moves_G, min(each.num_groups for each in found), len(predictions))
    if exclusive:
        if len(classes) == 2 and "auc" in macro:
            macro["auc"] = classes[1]["auc"]
        macro |= _joint(predictions, figures)
    return Influences(classes, macro)


def mean_influence(value_n: np.ndarray, of_n: np.ndarray, group_n: np.ndarray, num_groups: int) -> Influence:
    """The influences on the mean of `value_n` over the samples where `of_n` is true, which must be some."""
    return Influence(*_scaled(*_deviations(value_n, of_n), group_n, num_groups), int(of_n.sum()))


def _of_class(predictions: Predictions, figures: Figures, number: int, ranking: Ranking) -> dict[str, Influence]:
    truth, guess = predictions.truth_nC[:, number], predictions.guesses_nC[:, number]
    values = figures.classes[number]
    right, everyone = truth == guess, np.ones(len(truth), dtype=bool)
    guessed, named = int(guess.sum()), truth | guess
    square = (predictions.scores_nC[:, number] - truth) ** 2
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {
        "accuracy": [_deviations(right, everyone)],
        "sensitivity": [_deviations(guess, truth)],
        "specificity": [_deviations(~guess, ~truth)],
        "precision": [_deviations(truth, guess)],
        "brier": [_deviations(square, everyone)],
    }
    parts["balanced_accuracy"] = [(move / 2, of) for name in ("sensitivity", "specificity") for move, of in parts[name]]
    if (f1 := values["f1"]) is not None:
        move = (2.0 * (truth & guess) - f1 * (truth * 1.0 + guess)) / (truth.sum() + guessed)
        parts["f1"] = [(move, named)]
    if values["auc"] is not None:
        move = ranking.auc_influence()
        parts["auc"] = [(move * truth, truth), (move * ~truth, ~truth)]
        move = ranking.average_precision_influence()
        parts["average_precision"] = [(move * truth, truth), (move * ~truth, ~truth)]
    if values["mcc"] is not None:
        labels_n2, guesses_n2 = (np.stack([~of, of], 1).astype(np.float64) for of in (truth, guess))
        parts["mcc"] = [(_correlation_moves(labels_n2, guesses_n2), everyone)]
        parts["kappa"] = [(_agreement_moves(labels_n2, guesses_n2, 1 - np.eye(2)), everyone)]
    found = {name: _by_group(predictions, parts[name]) for name in FIGURES if values[name] is not None}
    if values["auc"] is not None:
        sides = min(_groups_of(predictions, truth), _groups_of(predictions, ~truth))
        for name in ("mcc", "kappa"):
            found[name] = replace(found[name], num_groups=sides)
    return found


def _joint(predictions: Predictions, figures: Figures) -> dict[str, Influence]:
    truth, guesses = predictions.truth_nC, predictions.guesses_nC
    everyone = np.ones(len(truth), dtype=bool)
    moves = {"accuracy": _deviations((truth & guesses).any(1), everyone)[0]}
    if figures.macro["mcc"] is not None:
        one_hot = truth.astype(np.float64), guesses.astype(np.float64)
        moves["mcc"] = _correlation_moves(*one_hot)
        if figures.macro["kappa"] is not None:
            moves["kappa"] = _agreement_moves(*one_hot, disagreement(predictions))
    return {name: _by_group(predictions, [(move, everyone)]) for name, move in moves.items()}


def _deviations(value_n: np.ndarray, of_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The influences on the mean of `value_n` over the samples `of_n`, and these samples."""
    size = int(of_n.sum())
    if not size:
        return np.zeros(len(value_n)), of_n
    value_n = value_n.astype(np.float64)
    return (value_n - value_n[of_n].mean()) * of_n / size, of_n


def _correlation_moves(truth_nC: np.ndarray, guess_nC: np.ndarray) -> np.ndarray:
    """The influences on the MCC: a correlation of one-hot vectors, so those of Pearson's r."""
    x, y = truth_nC - truth_nC.mean(0), guess_nC - guess_nC.mean(0)
    xy, xx, yy = (x * y).sum(1), (x * x).sum(1), (y * y).sum(1)
    if not yy.any():
        return np.zeros(len(x))
    r = xy.mean() / np.sqrt(xx.mean() * yy.mean())
    moves_n: np.ndarray = xy / np.sqrt(xx.mean() * yy.mean()) - r / 2 * (xx / xx.mean() + yy / yy.mean())
    return moves_n / len(x)


def _agreement_moves(truth_nC: np.ndarray, guess_nC: np.ndarray, weights_CC: np.ndarray) -> np.ndarray:
    """The influences on kappa, 1 less the observed over the expected disagreement."""
    labels, guesses = truth_nC.mean(0), guess_nC.mean(0)
    observed_n = np.einsum("ni,ij,nj->n", truth_nC, weights_CC, guess_nC, optimize=True)
    expected = labels @ weights_CC @ guesses
    expected_n = truth_nC @ weights_CC @ guesses + guess_nC @ weights_CC.T @ labels - 2 * expected
    observed = observed_n.mean()
    return np.asarray((observed / expected * expected_n - observed_n + observed) / expected / len(truth_nC))


def _by_group(predictions: Predictions, parts: list[tuple[np.ndarray, np.ndarray]]) -> Influence:
    """The sum over parts and groups, a group's part as large as leaving the group out would make it.

    Of a mean over m groups that is 1 over (1 - the group's share of the samples), times the square root of (m - 1) / m
    (the jackknife of clusters, "CV3": Bell and McCaffrey 2002): for single samples the usual m / (m - 1) of a variance.
    """
    group_n, num_groups = predictions.group_n, predictions.num_groups
    pairs = [_scaled(move_n, of_n, group_n, num_groups) for move_n, of_n in parts]
    with np.errstate(invalid="ignore"):
        moves_G = np.sum([moves for moves, _ in pairs], axis=0)
    return Influence(moves_G, min(groups for _, groups in pairs), int(parts[0][1].sum()))


def _scaled(move_n: np.ndarray, of_n: np.ndarray, group_n: np.ndarray, num_groups: int) -> tuple[np.ndarray, int]:
    """One part of `_by_group`, and in how many groups its samples are; infinite where that is one."""
    counts_G = np.bincount(group_n[of_n], minlength=num_groups)
    groups = int(np.count_nonzero(counts_G))
    if groups < 2:
        return np.full(num_groups, np.inf), groups
    summed_G = np.bincount(group_n, weights=move_n, minlength=num_groups)
    return summed_G * np.sqrt((groups - 1) / groups) / (1 - counts_G / counts_G.sum()), groups


def _groups_of(predictions: Predictions, of_n: np.ndarray) -> int:
    return len(np.unique(predictions.group_n[of_n]))
