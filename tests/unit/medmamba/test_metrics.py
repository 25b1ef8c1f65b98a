"""Metrics against scikit-learn's, and the inputs they must refuse."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics as sk

from medmamba.metrics.baselines import logistic_regression
from medmamba.metrics.classification import by_class, evaluate, macro_auc, rank_auc


def drawn(num_classes: int, *, task: str = "multiclass", n: int = 200, seed: int = 0):
    """Noisy but informative scores with many ties, and multi-hot labels that show every class."""
    rng = np.random.default_rng(seed)
    if task == "multilabel":
        labels = (rng.random((n, num_classes)) < 0.3).astype(np.uint8)
        return np.round(np.clip(labels * 0.3 + rng.random(labels.shape) * 0.7, 0, 1), 1), labels
    labels = np.eye(num_classes, dtype=np.uint8)[rng.integers(num_classes, size=n)]
    logits = np.round(labels * 1.0 + rng.normal(size=labels.shape), 1)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_exclusive_class_figures_are_those_of_scikit_learn(num_classes):
    scores, labels = drawn(num_classes)
    truth, guess = labels.argmax(1), scores.argmax(1)
    got = evaluate(scores, labels, "multiclass")
    auc = sk.roc_auc_score(truth, scores[:, 1] if num_classes == 2 else scores, multi_class="ovr")
    assert got["auc"] == pytest.approx(auc, abs=1e-12)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess), abs=1e-12)
    assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, guess), abs=1e-12)
    assert got["sensitivity"] == pytest.approx(sk.recall_score(truth, guess, average="macro"), abs=1e-12)
    assert got["f1"] == pytest.approx(sk.f1_score(truth, guess, average="macro"), abs=1e-12)
    rest = sk.multilabel_confusion_matrix(truth, guess)
    assert got["specificity"] == pytest.approx(np.mean(rest[:, 0, 0] / rest[:, 0].sum(1)), abs=1e-12)


def test_multilabel_figures_are_those_of_scikit_learn():
    scores, labels = drawn(4, task="multilabel")
    got = evaluate(scores, labels, "multilabel")
    assert got["auc"] == pytest.approx(sk.roc_auc_score(labels, scores, average="macro"), abs=1e-12)
    assert got["accuracy"] == pytest.approx(1 - sk.hamming_loss(labels, scores >= 0.5), abs=1e-12)
    assert got["f1"] == pytest.approx(sk.f1_score(labels, scores >= 0.5, average="macro"), abs=1e-12)


def test_an_ordinal_task_adds_grade_distance_and_quadratic_kappa():
    scores, labels = drawn(5)
    truth, guess = labels.argmax(1), scores.argmax(1)
    got = evaluate(scores, labels, "ordinal")
    assert got["mae"] == pytest.approx(sk.mean_absolute_error(truth, guess), abs=1e-12)
    assert got["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, guess, weights="quadratic"), abs=1e-12)


def test_by_class_tells_which_class_is_missed():
    labels = np.eye(2, dtype=int)[[0, 0, 0, 1, 1]]
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    rows = by_class(scores, labels, "multiclass")
    assert [row["sensitivity"] for row in rows] == [1.0, 0.5]
    assert [row["specificity"] for row in rows] == [0.5, 1.0]
    assert [row["positives"] for row in rows] == [3, 2]


def test_equal_scores_count_half():
    assert rank_auc(np.zeros(6), np.array([1, 0, 1, 0, 0, 0], dtype=bool)) == 0.5


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(lambda s, y: (np.where(s == s.max(), np.nan, s), y), "not finite", id="nan"),
        pytest.param(lambda s, y: (s[y[:, 1] == 0], y[y[:, 1] == 0]), "class 1 has 0 of", id="absent class"),
        pytest.param(lambda s, y: (s, y * 2), "0 or 1", id="labels that are counts"),
        pytest.param(lambda s, y: (s, np.ones_like(y)), "exactly one", id="two classes at once"),
        pytest.param(lambda s, y: (s[:-1], y), "labels", id="a sample without scores"),
        pytest.param(lambda s, y: (s[:, :1], y[:, :1]), "classes", id="one class"),
    ],
)
def test_input_that_would_give_a_flattering_number_is_refused(spoil, says):
    with pytest.raises(ValueError, match=says):
        evaluate(*spoil(*drawn(3)), "multiclass")


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="'binary'"):
        evaluate(*drawn(2), "binary")


def test_one_sample_dropped_or_doubled_moves_the_figures():
    scores, labels = drawn(3)
    full = evaluate(scores, labels, "multiclass")
    assert evaluate(scores[1:], labels[1:], "multiclass") != full
    assert evaluate(np.vstack([scores, scores[:1]]), np.vstack([labels, labels[:1]]), "multiclass") != full


def test_the_linear_baseline_finds_only_what_is_linear():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4, 4))
    linear, parity = (x[:, 0, 0] > 0).astype(int), ((x[:, 0, 0] > 0) ^ (x[:, 1, 1] > 0)).astype(int)
    for target, low, high in ((linear, 0.97, 1.0), (parity, 0.35, 0.65)):
        scores = logistic_regression(x[:400], np.eye(2, dtype=int)[target[:400]], x[400:], 2)
        assert scores.sum(1) == pytest.approx(1)
        assert low <= macro_auc(scores, np.eye(2)[target[400:]]) <= high


def test_the_linear_baseline_fits_each_label_of_multilabel():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6))
    labels = (x[:, :3] > 0.2).astype(int)
    scores = logistic_regression(x[:300], labels[:300], x[300:], 3)
    assert evaluate(scores, labels[300:], "multilabel")["auc"] > 0.97


def test_the_yardstick_refuses_a_class_it_never_saw():
    with pytest.raises(ValueError, match=r"classes \[0, 1\] of \[0, 1, 2\]"):
        logistic_regression(np.random.default_rng(0).normal(size=(4, 2)), np.array([0, 1, 0, 1]), np.zeros((1, 2)), 3)


def test_the_metrics_load_no_torch():
    modules = "medmamba.metrics.classification, medmamba.metrics.estimates, medmamba.metrics.baselines"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert 'torch' not in sys.modules"], check=True)


def test_baselines_use_few_threads_and_leave_others_alone():
    from threading import Event, Thread

    from threadpoolctl import threadpool_info, threadpool_limits

    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    seen: set[int] = set()
    over = Event()

    def watch():
        while not over.is_set():
            seen.update(threads())

    generator = np.random.default_rng(0)
    x, y = generator.random((1000, 400)), np.arange(1000) % 3
    watcher = Thread(target=watch)
    with threadpool_limits(6):  # by this thread, which alone may set them, as threadpoolctl has it
        watcher.start()
        logistic_regression(x, y, x, 3)
        over.set()
        watcher.join()
        assert max(threads()) == 6
    assert 2 in seen
