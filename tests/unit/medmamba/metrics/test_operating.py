"""Thresholds, figures at a threshold, and the decision curve."""

import numpy as np
import pytest
from clustered_sets import draw, strength_of
from scipy import stats
from sklearn import metrics as sk

from medmamba.metrics.operating import at_threshold, choose_threshold, decision_curve
from medmamba.metrics.predictions import checked_predictions


def sets(seed: int, n: int = 800):
    return draw(np.random.default_rng(seed), n, n, 2, strength_of(2, 0.88))


@pytest.mark.parametrize("wanted", [0.8, 0.9, 0.95, 1.0])
def test_a_threshold_just_reaches_the_wanted_share(wanted):
    validation = sets(0)
    score, truth = validation.scores_nC[:, 1], validation.truth_nC[:, 1]
    threshold = choose_threshold(validation, 1, sensitivity=wanted)
    assert (score[truth] >= threshold).mean() >= wanted
    assert (score[truth] >= np.nextafter(threshold, 2)).mean() < wanted
    threshold = choose_threshold(validation, 1, specificity=wanted)
    assert (score[~truth] < threshold).mean() >= wanted
    assert (score[~truth] < np.nextafter(threshold, 0)).mean() < wanted


def test_figures_at_a_threshold_equal_scikit_learn():
    test, threshold = sets(1), choose_threshold(sets(0), 1, sensitivity=0.9)
    truth, called = test.truth_nC[:, 1], test.scores_nC[:, 1] >= threshold
    point = at_threshold(test, 1, threshold)
    assert point.sensitivity.value == pytest.approx(sk.recall_score(truth, called), abs=1e-12)
    assert point.specificity.value == pytest.approx(sk.recall_score(~truth, ~called), abs=1e-12)
    assert point.precision.value == pytest.approx(sk.precision_score(truth, called), abs=1e-12)
    assert point.negative_value.value == pytest.approx(sk.precision_score(~truth, ~called), abs=1e-12)
    assert point.flagged.value == pytest.approx(called.mean(), abs=1e-12)
    assert point.sensitivity.value == pytest.approx(0.9, abs=0.06)
    assert point.sensitivity.low < point.sensitivity.value < point.sensitivity.high


def test_a_share_of_no_samples_is_none():
    point = at_threshold(sets(0, n=40), 1, 2.0)
    assert (point.precision.value, point.precision.low) == (None, None)
    assert (point.sensitivity.value, point.specificity.value) == (0.0, 1.0)


def test_wishes_that_cannot_be_met_are_refused():
    validation = sets(0, n=40)
    for wishes in ({}, {"sensitivity": 0.9, "specificity": 0.9}):
        with pytest.raises(ValueError, match="either"):
            choose_threshold(validation, 1, **wishes)
    with pytest.raises(ValueError, match="above 0"):
        choose_threshold(validation, 1, sensitivity=1.2)
    healthy = checked_predictions(np.full((4, 2), 0.5), np.eye(2, dtype=int)[[0] * 4], "multiclass")
    with pytest.raises(ValueError, match="no positive validation sample"):
        choose_threshold(healthy, 1, sensitivity=0.9)


def test_the_decision_curve_equals_one_counted_by_hand():
    test = sets(2)
    truth, score = test.truth_nC[:, 1], test.scores_nC[:, 1]
    curve = decision_curve(test, 1, [0.1, 0.3, 0.6])
    for at, threshold in enumerate([0.1, 0.3, 0.6]):
        called = score >= threshold
        expected = (called & truth).mean() - (called & ~truth).mean() * threshold / (1 - threshold)
        assert curve.model_t[at] == pytest.approx(expected, abs=1e-12)
        prevalence = truth.mean()
        assert curve.treat_all_t[at] == pytest.approx(prevalence - (1 - prevalence) * threshold / (1 - threshold))
        assert curve.low_t[at] < expected < curve.high_t[at]
    benefit = ((score >= 0.3) * np.where(truth, 1, -3 / 7)).astype(float)
    error = benefit.std(ddof=1) / np.sqrt(len(benefit))
    assert curve.high_t[1] - curve.model_t[1] == pytest.approx(stats.t.ppf(0.975, 799) * error, rel=0.03)


def test_calibrated_predictions_beat_treating_all_or_none():
    curve = decision_curve(sets(3, n=4000), 1)
    assert len(curve.thresholds_t) == 99
    useful = slice(9, 60)
    assert (curve.model_t[useful] > np.maximum(curve.treat_all_t[useful], 0)).all()
    with pytest.raises(ValueError, match="both excluded"):
        decision_curve(sets(3, n=40), 1, [0.0])
