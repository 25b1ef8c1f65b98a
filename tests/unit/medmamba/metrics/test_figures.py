"""Figures against scikit-learn's, also where a class is absent, always there, or never predicted."""

import numpy as np
import pytest
from sklearn import metrics as sk

from medmamba.metrics.figures import FIGURES, measure
from medmamba.metrics.predictions import checked_predictions, number_groups

TASKS = ("multiclass", "ordinal", "multilabel")


def drawn(task: str, classes: int, *, n: int = 120, seed: int = 0, shown: list[int] | None = None):
    """Scores with many ties and labels; of exclusive classes only those `shown` have samples."""
    rng = np.random.default_rng(seed)
    if task == "multilabel":
        labels = (rng.random((n, classes)) < 0.3).astype(np.int64)
        return np.round(np.clip(labels * 0.3 + rng.random(labels.shape) * 0.7, 0, 1), 1), labels
    labels = np.eye(classes, dtype=np.int64)[rng.choice(shown or classes, size=n)]
    odds = np.exp(np.round(labels + rng.normal(size=labels.shape), 1))
    return odds / odds.sum(1, keepdims=True), labels


def same(found: float | None, expected: float) -> None:
    assert found is not None
    assert found == pytest.approx(float(expected), abs=1e-12)


def check_class(found, score, truth, guess) -> None:
    """One class against scikit-learn's binary figures; None exactly where scikit-learn warns or tells nothing."""
    positives, both = truth.any(), 0 < truth.sum() < len(truth)
    same(found["accuracy"], sk.accuracy_score(truth, guess))
    same(found["brier"], np.mean((score - truth) ** 2))
    expected = {
        "sensitivity": positives and sk.recall_score(truth, guess),
        "precision": positives and guess.any() and sk.precision_score(truth, guess),
        "f1": positives and sk.f1_score(truth, guess),
        "specificity": not truth.all() and sk.recall_score(truth, guess, pos_label=0),
        "balanced_accuracy": both and sk.balanced_accuracy_score(truth, guess),
        "auc": both and sk.roc_auc_score(truth, score),
        "average_precision": both and sk.average_precision_score(truth, score),
        "mcc": both and sk.matthews_corrcoef(truth, guess),
        "kappa": both and sk.cohen_kappa_score(truth, guess),
    }
    for name, value in expected.items():
        if value is False or value is np.False_:
            assert found[name] is None, name
        else:
            same(found[name], value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_the_figures_of_each_class_are_those_of_scikit_learn(task, classes, seed):
    scores, labels = drawn(task, classes, seed=seed)
    predictions = checked_predictions(scores, labels, task)
    found = measure(predictions)
    for number in range(classes):
        truth, guess = labels[:, number], predictions.guesses_nC[:, number].astype(int)
        check_class(found.classes[number], scores[:, number], truth, guess)
        same(found.classes[number]["brier"], sk.brier_score_loss(truth, scores[:, number]))
    assert found.support == tuple(labels.sum(0))


@pytest.mark.parametrize("task", ["multiclass", "ordinal"])
@pytest.mark.parametrize("shown", [None, [0, 2, 3], [1], [0, 4]], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_figures_of_exclusive_classes_equal_scikit_learn(task, shown, seed):
    scores, labels = drawn(task, 5, seed=seed, shown=shown)
    truth, guess = labels.argmax(1), scores.argmax(1)
    there = sorted(set(truth))
    found = measure(checked_predictions(scores, labels, task))
    same(found.macro["accuracy"], sk.accuracy_score(truth, guess))
    same(found.macro["sensitivity"], sk.recall_score(truth, guess, labels=there, average="macro"))
    same(found.macro["balanced_accuracy"], found.macro["sensitivity"])
    same(found.macro["f1"], sk.f1_score(truth, guess, labels=there, average="macro"))
    same(found.macro["brier"], ((scores - labels) ** 2).sum(1).mean() / 5)
    assert found.averaged["sensitivity"] == found.averaged["f1"] == len(there)
    assert np.array_equal(found.confusion, sk.confusion_matrix(truth, guess, labels=range(5)))
    if len(there) == 1:
        assert [found.macro[name] for name in ("auc", "mcc", "kappa")] == [None] * 3
        assert found.averaged["auc"] == found.averaged["mcc"] == 0
        return
    weights = "quadratic" if task == "ordinal" else None
    same(found.macro["mcc"], sk.matthews_corrcoef(truth, guess))
    same(found.macro["kappa"], sk.cohen_kappa_score(truth, guess, labels=range(5), weights=weights))
    same(found.macro["auc"], np.mean([sk.roc_auc_score(labels[:, c], scores[:, c]) for c in there]))
    assert found.averaged["auc"] == len(there)


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_of_several_labels_are_means_over_the_labels(seed):
    scores, labels = drawn("multilabel", 4, seed=seed)
    labels[:, 2] = 0
    labels[:, 3] = 1
    found = measure(checked_predictions(scores, labels, "multilabel"))
    guesses = (scores >= 0.5).astype(int)
    for number in range(4):
        check_class(found.classes[number], scores[:, number], labels[:, number], guesses[:, number])
    same(found.macro["accuracy"], (labels == guesses).mean())
    same(found.macro["auc"], sk.roc_auc_score(labels[:, :2], scores[:, :2], average="macro"))
    same(found.macro["average_precision"], sk.average_precision_score(labels[:, :2], scores[:, :2], average="macro"))
    same(found.macro["sensitivity"], sk.recall_score(labels[:, [0, 1, 3]], guesses[:, [0, 1, 3]], average="macro"))
    assert (found.averaged["auc"], found.averaged["sensitivity"], found.averaged["brier"]) == (2, 3, 4)
    assert np.array_equal(found.confusion, sk.multilabel_confusion_matrix(labels, guesses))


def test_the_auc_of_two_exclusive_classes_is_that_of_class_1():
    small = np.array([1e-20, 3e-20, 2e-20, 0.4])
    labels = np.eye(2, dtype=int)[[0, 1, 0, 1]]
    found = measure(checked_predictions(np.stack([1 - small, small], 1), labels, "multiclass"))
    assert found.macro["auc"] == 1.0
    assert found.classes[0]["auc"] == 0.75


def test_a_class_never_predicted_has_no_precision_and_an_f1_of_0():
    scores = np.tile([0.8, 0.2], (6, 1))
    labels = np.eye(2, dtype=int)[[0, 0, 0, 1, 1, 0]]
    found = measure(checked_predictions(scores, labels, "multiclass"))
    rare = found.classes[1]
    assert (rare["precision"], rare["f1"], rare["mcc"], rare["kappa"], rare["auc"]) == (None, 0.0, 0.0, 0.0, 0.5)
    assert (found.macro["precision"], found.averaged["precision"]) == (pytest.approx(4 / 6), 1)
    assert found.macro["mcc"] == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_a_single_sample_gives_figures_or_none_and_never_nan(task):
    found = measure(checked_predictions(np.array([[0.3, 0.7]]), np.array([[0, 1]]), task))
    for row in (*found.classes, found.macro):
        assert set(row) == set(FIGURES)
        assert all(value is None or np.isfinite(value) for value in row.values())


def test_samples_without_a_group_are_groups_of_their_own():
    numbers, count = number_groups(["a", None, "b", "", "a", None], 6)
    assert (numbers.tolist(), count) == ([0, 1, 2, 3, 0, 4], 5)
    assert number_groups(None, 3)[1] == 3


@pytest.mark.parametrize(
    ("scores", "labels", "task", "groups", "message"),
    [
        ([[0.5, 0.5]], [[1, 1]], "multiclass", None, "exactly one 1"),
        ([[np.nan, 0.5]], [[1, 0]], "multiclass", None, "not finite"),
        ([[2.0, 0.5]], [[1, 0]], "multiclass", None, "probabilities"),
        ([[0.5, 0.5]], [[1, 0]], "regression", None, "must be multiclass"),
        ([[0.5, 0.5]], [[1, 0]], "multiclass", ["a", "b"], "2 groups of 1 samples"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "multiclass", None, "no samples"),
    ],
    ids=["labels", "nan", "logits", "task", "groups", "empty"],
)
def test_what_cannot_be_measured_is_refused(scores, labels, task, groups, message):
    with pytest.raises(ValueError, match=message):
        checked_predictions(np.array(scores), np.array(labels), task, groups)
