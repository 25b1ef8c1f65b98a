"""Intervals and paired differences: against published implementations, by brute force, and at the extremes."""

import time

import numpy as np
import pytest
from clustered_sets import draw, strength_of, true_figures
from MLstatkit.delong import Delong_test
from scipy import special, stats

from medmamba.metrics.confidence import clopper_pearson
from medmamba.metrics.estimates import compare, estimate, what_it_can_show
from medmamba.metrics.figures import FIGURES, measure
from medmamba.metrics.influence import influences
from medmamba.metrics.predictions import Predictions, checked_predictions


def binary(score, truth, groups=None) -> Predictions:
    score = np.asarray(score, dtype=np.float64)
    return checked_predictions(np.stack([1 - score, score], 1), np.eye(2, dtype=int)[truth], "multiclass", groups)


def two_models(seed: int, n: int = 90) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and two correlated scores with ties, all of them exact fractions of 64."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.35).astype(int)
    common = rng.normal(size=n) + truth
    return truth, *(np.round(special.expit(common + rng.normal(size=n)) * 64) / 64 for _ in range(2))


@pytest.mark.parametrize("seed", range(8))
def test_variances_of_the_auc_equal_a_published_delong(seed):
    truth, one, two = two_models(seed)
    _, _, (low, high), _, auc_one, auc_two, info = Delong_test(truth, one, two)
    first, second = binary(one, truth), binary(two, truth)
    mine, other, apart = (each.macro["auc"] for each in (estimate(first), estimate(second), compare(first, second)))
    assert mine.value == pytest.approx(auc_one, abs=1e-12)
    assert mine.standard_error == pytest.approx((high - low) / 2 / stats.norm.ppf(0.975), abs=1e-10)
    assert apart.value == pytest.approx(auc_one - auc_two, abs=1e-12)
    assert apart.standard_error**2 == pytest.approx(info["var_diff"], abs=1e-10)
    assert mine.low < mine.value < mine.high
    assert other.value == pytest.approx(auc_two, abs=1e-12)


def test_the_variance_of_a_clustered_auc_is_obuchowskis():
    rng = np.random.default_rng(1)
    truth = np.repeat(rng.permutation([0] * 25 + [1] * 15), 3)
    score = special.expit(truth + np.repeat(rng.normal(size=40), 3) + rng.normal(size=120))
    found = estimate(binary(score, truth, [str(row // 3) for row in range(120)])).macro["auc"]
    wins = (score[truth == 1][:, None] > score[truth == 0]) * 1.0
    parts = [(wins.mean(1 - axis).reshape(-1, 3).sum(1) - 3 * wins.mean(), size) for axis, size in ((0, 15), (1, 25))]
    expected = sum(size / (size - 1) * (part**2).sum() / (3 * size) ** 2 for part, size in parts)
    assert found.standard_error**2 == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", ["multiclass", "ordinal", "multilabel"])
def test_influences_are_derivatives_by_the_weight_of_a_group(task):
    """A group's weight grows by 1 in 2,000: all samples are repeated as often, its own once more."""
    rng = np.random.default_rng(3)
    labels = np.eye(3, dtype=int)[rng.integers(3, size=40)]
    if task == "multilabel":
        labels = (rng.random((40, 3)) < 0.4).astype(int)
    odds = np.exp(np.round(labels + rng.normal(size=labels.shape), 1))
    scores = odds / (1 + odds) if task == "multilabel" else odds / odds.sum(1, keepdims=True)
    predictions = checked_predictions(scores, labels, task)
    figures = measure(predictions)
    found = influences(predictions, figures)
    times = 2000
    for group in (0, 7, 21):
        rows = np.concatenate([np.repeat(np.arange(40), times), [group]])
        moved = measure(predictions.rows(rows))
        pairs = [*zip(found.classes, figures.classes, moved.classes, strict=True)]
        for moves, before, after in [*pairs, (found.macro, figures.macro, moved.macro)]:
            for name in FIGURES:
                slope = (after[name] - before[name]) * times
                # The factor of small samples is at most 1.05 on each side of a figure.
                assert moves[name].moves_G[group] == pytest.approx(slope, rel=0.06, abs=2e-4), name


def test_groups_of_one_sample_each_are_the_same_as_no_groups():
    predictions = draw(np.random.default_rng(0), 200, 200, 3, 1.5)
    named = checked_predictions(
        predictions.scores_nC, predictions.truth_nC.astype(int), "ordinal", [str(row) for row in range(200)]
    )
    assert estimate(named).macro == estimate(predictions).macro


def test_repeated_images_of_a_group_narrow_no_interval():
    single = draw(np.random.default_rng(0), 150, 150, 2, 1.7)
    rows = np.repeat(np.arange(150), 4)
    repeated = checked_predictions(
        single.scores_nC[rows], single.truth_nC[rows].astype(int), "ordinal", [str(row) for row in rows]
    )
    once, often = estimate(single), estimate(repeated)
    for name in FIGURES:
        assert often.macro[name].half_width == pytest.approx(once.macro[name].half_width, rel=0.02), name


@pytest.mark.parametrize("kind", ["perfect", "wrong", "constant", "one group a side", "no class", "one sample"])
@pytest.mark.parametrize("task", ["multiclass", "ordinal", "multilabel"])
def test_figures_are_within_their_intervals_at_extremes_too(task, kind):
    size = 1 if kind == "one sample" else 40
    labels = np.eye(2, dtype=int)[np.arange(size) % 2]
    if kind == "no class":
        labels = np.eye(2, dtype=int)[np.zeros(size, dtype=int)]
    scores = {"wrong": 1.0 - labels, "constant": np.tile([0.7, 0.3], (size, 1))}.get(kind, labels * 0.6 + 0.2)
    groups = ["well" if row[0] else "ill" for row in labels] if kind == "one group a side" else None
    found = estimate(checked_predictions(scores, labels, task, groups))
    for row in (*found.classes, found.macro):
        for name in FIGURES:
            each = row[name]
            if each.value is None:
                assert (each.low, each.high, each.standard_error) == (None, None, None)
                continue
            assert -1.0 <= each.low <= each.value <= each.high <= 1.0, name
            if name != "brier" or kind == "wrong":
                assert each.high - each.low > 0.05, name


@pytest.mark.parametrize("name", ["auc", "sensitivity", "specificity", "accuracy"])
def test_the_bound_of_perfect_predictions_is_exact(name):
    truth = np.arange(60) % 3 == 0
    found = estimate(binary(np.where(truth, 0.9, 0.1), truth.astype(int))).classes[1][name]
    groups = {"auc": 20, "sensitivity": 20, "specificity": 40, "accuracy": 60}[name]
    assert (found.high, found.method) == (1.0, "exact")
    assert found.low == pytest.approx(stats.beta.ppf(0.025, groups, 1), abs=1e-12)


@pytest.mark.parametrize(("hits", "trials"), [(0, 9), (3, 12), (57, 60), (9, 9)])
def test_binomial_limits_are_those_of_scipy(hits, trials):
    expected = stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_pairing_narrows_the_difference_of_two_models():
    truth, one, two = two_models(5, n=300)
    groups = [str(row // 2) for row in range(300)]
    first, second = binary(one, truth, groups), binary(two, truth, groups)
    both = compare(first, second)
    for name in FIGURES:
        a, b, apart = estimate(first).macro[name], estimate(second).macro[name], both.macro[name]
        assert apart.value == pytest.approx(a.value - b.value, abs=1e-12)
        assert 0 < apart.standard_error < np.hypot(a.standard_error, b.standard_error)
        assert apart.low < apart.value < apart.high
        again = compare(second, first).macro[name]
        assert (again.value, again.low) == pytest.approx((-apart.value, -apart.high), abs=1e-12)


def test_the_p_of_a_margin_agrees_with_the_interval():
    truth, one, two = two_models(2)
    apart = compare(binary(one, truth), binary(two, truth)).macro["auc"]
    assert apart.p_above(apart.value) == pytest.approx(0.5)
    assert apart.p_above(apart.low) == pytest.approx(0.025)
    assert apart.p_above(apart.high) == pytest.approx(0.975)


def test_equal_predictions_show_as_much_as_their_groups_allow():
    truth, one, _ = two_models(0)
    same = compare(binary(one, truth), binary(one, truth)).macro
    assert (same["accuracy"].value, same["accuracy"].standard_error) == (0, 0)
    assert same["accuracy"].low == pytest.approx(-(1 - 0.025 ** (1 / 90)))
    assert same["accuracy"].p_above(0.0) == 1.0
    assert same["accuracy"].p_above(-0.02) == pytest.approx(0.98**90)
    assert same["auc"].p_above(-0.02) == pytest.approx(0.98 ** min(truth.sum(), 90 - truth.sum()))


def test_predictions_of_other_samples_are_not_compared():
    truth, one, two = two_models(0)
    with pytest.raises(ValueError, match="not of the same samples"):
        compare(binary(one, truth), binary(two, 1 - truth))
    with pytest.raises(ValueError, match="not of the same samples"):
        compare(binary(one, truth), binary(two, truth, ["a"] * 45 + ["b"] * 45))


def test_intervals_of_7180_samples_and_9_classes_take_seconds():
    rng = np.random.default_rng(0)
    labels = np.eye(9, dtype=int)[rng.integers(9, size=7180)]
    odds = np.exp(2 * labels + rng.normal(size=labels.shape))
    groups = [str(each) for each in rng.integers(900, size=7180)]
    begin = time.perf_counter()
    found = estimate(checked_predictions(odds / odds.sum(1, keepdims=True), labels, "multiclass", groups))
    assert time.perf_counter() - begin < 10
    assert all(each.low < each.value < each.high for row in (*found.classes, found.macro) for each in row.values())


def test_the_sentence_says_what_the_sample_size_can_show():
    found = estimate(draw(np.random.default_rng(0), 156, 140, 2, strength_of(2, 0.88)))
    half_width = found.macro["auc"].half_width
    assert what_it_can_show(found) == (
        f"With 156 images of 140 patients, a difference in AUC below about {half_width:.2f} cannot be distinguished "
        "from chance."
    )
    many = estimate(draw(np.random.default_rng(0), 50_000, 50_000, 2, strength_of(2, 0.99)))
    assert what_it_can_show(many).startswith("With 50,000 images, a difference in AUC below about 0.001")
    one_class = estimate(checked_predictions(np.full((5, 2), 0.5), np.eye(2, dtype=int)[[0] * 5], "multiclass"))
    assert what_it_can_show(one_class).startswith("With 5 images no AUC can be shown")


def test_most_intervals_of_a_few_clustered_sets_hold_the_truth():
    """60 sets: 9 of 10 with a chance above 99.9 % where 19 of 20 are covered."""
    truth, strength = true_figures(2, 0.88, 200_000), strength_of(2, 0.88)
    sets = [estimate(draw(np.random.default_rng(seed), 156, 60, 2, strength)) for seed in range(60)]
    for name in FIGURES:
        held = [each.macro[name].low <= truth.macro[name] <= each.macro[name].high for each in sets]
        assert np.mean(held) >= 0.85, name
