"""Calibration: temperature, calibration error and reliability curve, on predictions whose calibration is known."""

import numpy as np
import pytest
from clustered_sets import draw
from scipy import special, stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from medmamba.metrics.calibration import (
    calibration,
    fit_temperature,
    log_scores,
    negative_log_likelihood,
    with_temperature,
)
from medmamba.metrics.figures import measure
from medmamba.metrics.predictions import checked_predictions

OVERCONFIDENT = 2.5
TASKS = {
    "binary": ("multiclass", 2),
    "multiclass": ("multiclass", 4),
    "ordinal": ("ordinal", 3),
    "labels": ("multilabel", 3),
}


def overconfident(kind: str, seed: int, n: int = 1500):
    """Logits 2.5 times too large of labels drawn from the probabilities of the right ones."""
    task, classes = TASKS[kind]
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=(n, classes))
    if task == "multilabel":
        return logits * OVERCONFIDENT, (rng.random(logits.shape) < special.expit(logits)).astype(int), task
    drawn = (special.softmax(logits, 1).cumsum(1) < rng.random((n, 1))).sum(1)
    return logits * OVERCONFIDENT, np.eye(classes, dtype=int)[np.minimum(drawn, classes - 1)], task


@pytest.mark.parametrize("kind", TASKS)
def test_the_planted_temperature_is_found_and_lowers_the_loss(kind):
    logits, labels, task = overconfident(kind, 0)
    temperature = fit_temperature(logits, labels, task)
    assert temperature == pytest.approx(OVERCONFIDENT, rel=0.2)
    test_logits, test_labels, _ = overconfident(kind, 1)
    before = negative_log_likelihood(test_logits, test_labels, task)
    after = negative_log_likelihood(test_logits, test_labels, task, temperature)
    assert after < before - 0.05
    probabilities = with_temperature(test_logits, temperature, task)
    if task == "multilabel":
        assert after == pytest.approx(
            np.mean([sk.log_loss(*pair) for pair in zip(test_labels.T, probabilities.T, strict=True)])
        )
    else:
        assert after == pytest.approx(sk.log_loss(test_labels.argmax(1), probabilities, labels=range(labels.shape[1])))


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("temperature", [0.4, 1.7, 6.0])
def test_a_temperature_keeps_predictions_and_binary_auc(kind, temperature):
    logits, labels, task = overconfident(kind, 2)
    logits /= OVERCONFIDENT
    before = measure(checked_predictions(with_temperature(logits, 1.0, task), labels, task))
    after = measure(checked_predictions(with_temperature(logits, temperature, task), labels, task))
    assert np.array_equal(before.confusion, after.confusion)
    if kind in ("binary", "labels"):
        assert after.macro["auc"] == before.macro["auc"]
    else:
        assert after.macro["auc"] == pytest.approx(before.macro["auc"], abs=0.02)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_serve_in_place_of_logits(kind, dtype):
    logits, labels, task = overconfident(kind, 3)
    scores = with_temperature(logits, 1.0, task).astype(dtype)
    again = log_scores(scores, task)
    assert np.isfinite(again).all()
    assert with_temperature(again, 1.0, task) == pytest.approx(scores, abs=1e-6)
    assert fit_temperature(again, labels, task) == pytest.approx(fit_temperature(logits, labels, task), rel=0.01)


def test_rounded_probabilities_have_finite_logits():
    scores = np.array([[0.0, 1.0]], dtype=np.float32)
    assert np.isfinite(log_scores(scores, "multilabel")).all()
    assert with_temperature(log_scores(scores, "multiclass"), 1.0, "multiclass") == pytest.approx(scores)


def test_the_curve_is_that_of_scikit_learn():
    predictions = draw(np.random.default_rng(0), 600, 600, 2, 1.7)
    found = calibration(predictions, 1, bins=10)
    score, truth = predictions.scores_nC[:, 1], predictions.truth_nC[:, 1]
    observed, confidence = calibration_curve(truth, score, n_bins=10, strategy="quantile")
    assert [each.observed.value for each in found.curve] == pytest.approx(observed)
    assert [each.confidence for each in found.curve] == pytest.approx(confidence)
    assert sum(each.count for each in found.curve) == 600
    counts = np.array([each.count for each in found.curve])
    assert found.plain_error == pytest.approx((np.abs(observed - confidence) * counts).sum() / 600)
    assert all(each.observed.low <= each.observed.value <= each.observed.high for each in found.curve)


def test_the_calibration_error_tells_overconfidence():
    plain, debiased, held = [], [], []
    for seed in range(40):
        found = calibration(draw(np.random.default_rng(seed), 500, 200, 3, 1.5))
        plain.append(found.plain_error)
        debiased.append(found.error.value)
        held.append(found.error.low <= 0.003)
    assert np.mean(debiased) < 0.5 * np.mean(plain)
    assert np.mean(held) >= 0.9
    logits, labels, task = overconfident("multiclass", 0)
    found = calibration(checked_predictions(with_temperature(logits, 1.0, task), labels, task))
    assert found.error.low > 0.1


def test_the_interval_of_the_error_holds_the_true_error():
    """Probabilities of a binary label that are all too high by a known, varying amount; the true error is exact."""
    held = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        true = rng.uniform(0.1, 0.8, 120)[np.arange(480) // 4]
        stated = true + 0.1
        truth = (stats.norm.ppf(true) > rng.normal(size=480)).astype(int)
        predictions = checked_predictions(
            np.stack([1 - stated, stated], 1),
            np.eye(2, dtype=int)[truth],
            "multiclass",
            [str(g) for g in np.arange(480) // 4],
        )
        found = calibration(predictions, 1, bins=10)
        held.append(found.error.low <= 0.1 <= found.error.high)
    assert np.mean(held) >= 0.9


def test_calibration_needs_bins_and_a_temperature_samples():
    with pytest.raises(ValueError, match="at least one"):
        calibration(draw(np.random.default_rng(0), 20, 20, 2, 1.0), bins=0)
    with pytest.raises(ValueError, match="no validation samples"):
        fit_temperature(np.zeros((0, 2)), np.zeros((0, 2)), "multiclass")


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_one_sample_or_group_has_a_finite_calibration(task):
    for groups in (None, ["a"] * 4):
        labels = np.eye(2, dtype=int)[[0, 1, 0, 1]]
        predictions = checked_predictions(np.abs(labels - 0.2), labels, task, groups)
        found = calibration(predictions)
        assert 0 <= found.error.low <= found.error.value <= found.error.high <= 1
