"""Prediction sets, abstaining, and the score of foreign images, on simulated data."""

import numpy as np
import pytest
from clustered_sets import draw, strength_of
from scipy import special

from medmamba.metrics.abstaining import choose_confidence, confidences, energy, energy_limit, risk_curve
from medmamba.metrics.conformal import fit_sets, measure_sets
from medmamba.metrics.predictions import checked_predictions


def sets(seed: int, n: int = 3000, classes: int = 3):
    return draw(np.random.default_rng(seed), n, n, classes, strength_of(classes, 0.88))


def labelled(seed: int, n: int = 3000):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 4)) < [0.1, 0.3, 0.5, 0.2]).astype(int)
    return checked_predictions(special.expit(2 * labels - 1 + rng.normal(size=labels.shape)), labels, "multilabel")


@pytest.mark.parametrize("miss", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("make", [sets, labelled], ids=["exclusive", "labels"])
def test_sets_cover_within_2_points_of_what_was_asked_for(make, miss):
    found = measure_sets(fit_sets(make(0), miss=miss), make(1))
    assert found.coverage.value == pytest.approx(1 - miss, abs=0.02)
    assert found.coverage.low < found.coverage.value < found.coverage.high


@pytest.mark.parametrize("miss", [0.1, 0.2])
@pytest.mark.parametrize("make", [sets, labelled], ids=["exclusive", "labels"])
def test_only_sets_by_class_cover_every_class(make, miss):
    validation, test = make(0, n=60_000), make(1, n=60_000)
    found = measure_sets(fit_sets(validation, miss=miss, by_class=True), test)
    for each in found.coverage_by_class:
        assert each.value == pytest.approx(1 - miss, abs=0.02)
    if make is sets:
        overall = measure_sets(fit_sets(validation, miss=miss), test)
        assert min(each.value for each in overall.coverage_by_class) < 1 - miss - 0.05


def test_small_validation_sets_keep_the_mean_coverage():
    test = sets(99)
    found = [measure_sets(fit_sets(sets(seed, n=27), miss=0.1), test).coverage.value for seed in range(150)]
    assert 0.9 - 0.01 <= np.mean(found) <= 0.9 + 1 / 28 + 0.01


def test_the_size_of_sets_is_counted():
    rule, test = fit_sets(sets(0), miss=0.1), sets(1)
    size = (test.scores_nC >= rule.limits_C[0]).sum(1)
    found = measure_sets(rule, test)
    assert found.mean_size == pytest.approx(size.mean())
    assert (found.empty.value, found.single.value) == (
        pytest.approx((size == 0).mean()),
        pytest.approx((size == 1).mean()),
    )


def test_a_class_with_too_few_samples_is_never_ruled_out():
    labels = np.eye(2, dtype=int)[[0] * 50 + [1] * 5]
    validation = checked_predictions(np.abs(labels - 0.1), labels, "multiclass")
    rule = fit_sets(validation, miss=0.1, by_class=True)
    assert rule.limits_C[1] == 0.0
    assert rule.sets(np.array([[1.0, 0.0]])).tolist() == [[True, True]]
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit_sets(validation, miss=1.0)


def test_only_useful_confidence_lowers_the_risk():
    test = sets(1)
    curve = risk_curve(test)
    wrong = test.scores_nC.argmax(1) != test.truth_nC.argmax(1)
    assert (curve.coverage_k[-1], curve.risk_k[-1]) == (1.0, pytest.approx(wrong.mean()))
    half = np.searchsorted(curve.coverage_k, 0.5)
    assert curve.risk_k[half] < wrong.mean() / 2
    assert 0 < curve.excess < curve.area < wrong.mean()
    constant = checked_predictions(
        np.tile([0.6, 0.4], (50, 1)), np.eye(2, dtype=int)[[0] * 40 + [1] * 10], "multiclass"
    )
    assert risk_curve(constant).area == pytest.approx(0.2)


def test_the_area_is_that_of_a_loop_over_samples_without_ties():
    test = sets(2, n=200)
    wrong = (test.scores_nC.argmax(1) != test.truth_nC.argmax(1))[np.argsort(-confidences(test))]
    assert risk_curve(test).area == pytest.approx(np.mean([wrong[: k + 1].mean() for k in range(200)]), abs=1e-12)


def test_a_confidence_chosen_on_validation_holds_on_test():
    at = choose_confidence(sets(0), 0.1)
    test = sets(1)
    answered = confidences(test) >= at
    wrong = test.scores_nC.argmax(1) != test.truth_nC.argmax(1)
    assert 0.3 < answered.mean() < 0.9
    assert wrong[answered].mean() == pytest.approx(0.1, abs=0.03)
    hopeless = checked_predictions(np.tile([0.6, 0.4], (9, 1)), np.eye(2, dtype=int)[[1] * 9], "multiclass")
    assert choose_confidence(hopeless, 0.1) is None


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_images_without_evidence_exceed_the_energy_limit(task):
    rng = np.random.default_rng(0)
    known = 6 * np.eye(4)[rng.integers(4, size=1000)] + rng.normal(size=(1000, 4)) - 2 * (task == "multilabel")
    foreign = rng.normal(size=(500, 4)) - 2 * (task == "multilabel")
    limit = energy_limit(energy(known, task))
    assert (energy(known, task) > limit).mean() == pytest.approx(0.05, abs=0.002)
    assert (energy(foreign, task) > limit).mean() > 0.5
    with pytest.raises(ValueError, match="needs samples"):
        energy_limit(np.array([]))


def test_energy_is_finite_for_large_logits():
    assert energy(np.array([[1e4, 0.0]]), "multiclass").tolist() == [-1e4]
    assert energy(np.array([[1e4, -1e4]]), "multilabel").tolist() == [-1e4]
