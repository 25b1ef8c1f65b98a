"""Scores and multi-hot labels -> the metrics of a task.

Shapes: n samples, C classes. Each sample counts once; "macro" is the plain mean over classes, and sensitivity,
specificity, F1 and AUC are macro for every task, also with two classes (which class is the disease differs between
data sets; `by_class` has the figures of each).
"""

from __future__ import annotations

import numpy as np

THRESHOLD = 0.5  # of a multilabel score, as in MedMNIST's evaluator


def evaluate(scores_nC: np.ndarray, labels_nC: np.ndarray, task: str) -> dict[str, float]:
    """accuracy, balanced_accuracy, auc, sensitivity, specificity, f1; ordinal adds mae and kappa (quadratic).

    The predicted class is the one with the largest score; multilabel: each label whose score reaches 0.5, accuracy
    and the rest then being means over labels. Raises ValueError for scores that are not finite, shapes that do not
    fit, labels the task does not allow, and a class without positive or negative samples (a mean over the classes
    that happen to be there would flatter).
    """
    scores_nC, labels_nC = checked(scores_nC, labels_nC, task)
    rows = by_class(scores_nC, labels_nC, task)
    figures = {
        "accuracy": accuracy(scores_nC, labels_nC, task),
        "balanced_accuracy": _mean(rows, "sensitivity"),
        "auc": macro_auc(scores_nC, labels_nC, task),
        "sensitivity": _mean(rows, "sensitivity"),
        "specificity": _mean(rows, "specificity"),
        "f1": _mean(rows, "f1"),
    }
    if task == "multilabel":
        figures["balanced_accuracy"] = (figures["sensitivity"] + figures["specificity"]) / 2
    if task == "ordinal":
        from sklearn.metrics import cohen_kappa_score

        truth_n, guess_n = labels_nC.argmax(1), scores_nC.argmax(1)
        figures["mae"] = float(np.abs(truth_n - guess_n).mean())
        figures["kappa"] = float(cohen_kappa_score(truth_n, guess_n, weights="quadratic"))
    return figures


def by_class(scores_nC: np.ndarray, labels_nC: np.ndarray, task: str) -> list[dict[str, float]]:
    """Per class, one against the rest: auc, sensitivity, specificity, f1, and how many samples are positive."""
    scores_nC, labels_nC = checked(scores_nC, labels_nC, task)
    guesses_nC = predicted_labels(scores_nC, task)
    rows = []
    for score_n, truth_n, guess_n in zip(scores_nC.T, labels_nC.T, guesses_nC.T, strict=True):
        hits, positives, guessed = int((guess_n & truth_n).sum()), int(truth_n.sum()), int(guess_n.sum())
        rows.append(
            {
                "auc": rank_auc(score_n, truth_n),
                "sensitivity": hits / positives,
                "specificity": float((~guess_n & ~truth_n).sum() / (~truth_n).sum()),
                "f1": 2 * hits / (positives + guessed),
                "positives": positives,
            }
        )
    return rows


def accuracy(scores_nC: np.ndarray, labels_nC: np.ndarray, task: str) -> float:
    """Share of samples (multilabel: of labels) that are predicted right."""
    truth_nC, guesses_nC = labels_nC.astype(bool), predicted_labels(scores_nC, task)
    return float((guesses_nC == truth_nC).mean() if task == "multilabel" else (guesses_nC & truth_nC).any(1).mean())


def macro_auc(scores_nC: np.ndarray, labels_nC: np.ndarray, task: str = "multiclass") -> float:
    """Mean over classes of the one-against-rest AUC; of two exclusive classes it is the AUC of class 1."""
    if scores_nC.shape[1] == 2 and task != "multilabel":
        return rank_auc(scores_nC[:, 1], labels_nC[:, 1].astype(bool))
    return float(np.mean([rank_auc(s, y.astype(bool)) for s, y in zip(scores_nC.T, labels_nC.T, strict=True)]))


def rank_auc(score_n: np.ndarray, truth_n: np.ndarray) -> float:
    """Probability that a positive sample outscores a negative one, ties counting half (Mann-Whitney U).

    `truth_n` is boolean with both values.
    """
    rank_n = np.unique(score_n, return_inverse=True)[1]
    counts = np.bincount(rank_n)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    positives = int(truth_n.sum())
    rank_sum = mean_rank[rank_n[truth_n]].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * (len(truth_n) - positives)))


def checked(scores_nC: np.ndarray, labels_nC: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """The two as float64 and boolean arrays; raises ValueError as `evaluate` says."""
    scores, labels = checked_arrays(scores_nC, labels_nC, task)
    positives = labels.sum(0, dtype=np.int64)
    if (bad := np.flatnonzero((positives == 0) | (positives == len(labels)))).size:
        raise ValueError(
            f"class {int(bad[0])} has {int(positives[bad[0]])} of {len(labels)} samples: every class needs samples "
            "with and without it for AUC and sensitivity; draw the split again or merge classes"
        )
    return scores, labels


def checked_arrays(scores_nC: np.ndarray, labels_nC: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """As `checked`, but a class may be absent, or the class of every sample."""
    scores, labels = np.asarray(scores_nC, dtype=np.float64), np.asarray(labels_nC)
    if task not in ("multiclass", "ordinal", "multilabel"):
        raise ValueError(f"task {task!r}: must be multiclass, ordinal or multilabel")
    if scores.ndim != 2 or scores.shape != labels.shape or scores.shape[1] < (1 if task == "multilabel" else 2):
        raise ValueError(
            f"scores {scores.shape} and labels {labels.shape}: both must be (samples, classes), labels multi-hot"
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{int((~np.isfinite(scores)).any(1).sum())} of {len(scores)} samples have scores that are not finite: "
            "the model has diverged; lower the learning rate or train in float32"
        )
    if not np.isin(labels, (0, 1)).all() or (task != "multilabel" and (labels.sum(1) != 1).any()):
        raise ValueError(f"labels must be 0 or 1, with exactly one 1 per sample unless multilabel (task {task!r})")
    return scores, labels.astype(bool)


def predicted_labels(scores_nC: np.ndarray, task: str) -> np.ndarray:
    """Boolean (n, C): the predicted class of each sample, the first of several largest; multilabel: labels from 0.5."""
    if task == "multilabel":
        return np.asarray(scores_nC >= THRESHOLD)
    return np.asarray(np.arange(scores_nC.shape[1]) == scores_nC.argmax(1)[:, None])


def _mean(rows: list[dict[str, float]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
