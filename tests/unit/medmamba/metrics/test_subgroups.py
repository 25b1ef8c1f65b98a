"""Figures by metadata column."""

import numpy as np
import pytest
from clustered_sets import draw, strength_of

from medmamba.metrics.estimates import estimate
from medmamba.metrics.predictions import checked_predictions
from medmamba.metrics.subgroups import name_values, rank_subgroups


def planted(seed: int = 0):
    """900 images, those of scanner C with labels of other images in half of the cases."""
    rng = np.random.default_rng(seed)
    good = draw(rng, 900, 600, 3, strength_of(3, 0.95))
    scanner = rng.choice(["A", "B", "C"], size=900)
    labels = good.truth_nC.astype(int)
    spoilt = np.flatnonzero((scanner == "C") & (rng.random(900) < 0.5))
    labels[spoilt] = labels[rng.permutation(spoilt)]
    groups = [str(number) for number in good.group_n]
    age = rng.normal(60, 10, 900)
    columns = {"sex": rng.choice(["f", "m"], size=900).tolist(), "age": age.tolist(), "scanner": scanner.tolist()}
    return checked_predictions(good.scores_nC, labels, "multiclass", groups), columns


@pytest.mark.parametrize("by", ["auc", "accuracy", "kappa", "brier"])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_weak_subgroup_is_the_first(by, seed):
    predictions, columns = planted(seed)
    found = rank_subgroups(predictions, columns, by=by)
    assert (found[0].column, found[0].value, found[0].unranked) == ("scanner", "C", None)
    assert found[0].figure == found[0].estimates.macro[by]
    values = [each.figure.value for each in found]
    assert values == sorted(values, reverse=by == "brier")
    assert len(found) == 2 + 3 + 3


def test_the_figures_of_a_subgroup_are_those_of_its_samples():
    predictions, columns = planted()
    rows = [row for row in range(900) if columns["scanner"][row] == "B"]
    alone = checked_predictions(
        predictions.scores_nC[rows],
        predictions.truth_nC[rows].astype(int),
        "multiclass",
        [str(number) for number in predictions.group_n[rows]],
    )
    found = next(each for each in rank_subgroups(predictions, columns) if each.value == "B")
    for name, each in estimate(alone).macro.items():
        got = found.estimates.macro[name]
        assert (got.value, got.low, got.high) == pytest.approx((each.value, each.low, each.high), abs=1e-9)


def test_numbers_become_tertiles_and_missing_values_a_group():
    values = [*range(9), None, float("nan")]
    names = name_values(values)
    assert names == ["0 to 2"] * 3 + ["above 2 to 5"] * 3 + ["above 5 to 8"] * 3 + ["missing"] * 2
    assert name_values([1, 2, 1, None, ""]) == ["1", "2", "1", "missing", "missing"]
    assert name_values([True, False]) == ["True", "False"]
    assert name_values([None, None]) == ["missing"] * 2
    assert set(name_values([0.0] * 90 + list(range(1, 11)))) == {"0 to 0", "above 0 to 10"}


def test_small_subgroups_are_listed_last_with_the_reason():
    predictions, columns = planted()
    columns = {"scanner": ["rare"] * 12 + ["one patient"] * 40 + columns["scanner"][52:]}
    groups = [str(n) for n in range(12)] + ["same"] * 40 + [f"g{n}" for n in range(848)]
    predictions = checked_predictions(predictions.scores_nC, predictions.truth_nC.astype(int), "multiclass", groups)
    found = rank_subgroups(predictions, columns)
    assert [each.value for each in found[-2:]] == ["one patient", "rare"]
    assert [each.unranked for each in found[-2:]] == ["1 groups, fewer than 10", "12 samples, fewer than 30"]
    assert all(each.unranked is None for each in found[:-2])


def test_a_subgroup_without_the_figure_is_not_ranked():
    labels = np.eye(2, dtype=int)[[0] * 60 + [0, 1] * 30]
    scores = np.abs(labels - np.linspace(0.1, 0.6, 120)[:, None])
    found = rank_subgroups(checked_predictions(scores, labels, "multilabel"), {"site": ["x"] * 60 + ["y"] * 60})
    assert [(each.value, each.unranked) for each in found] == [
        ("y", None),
        ("x", "auc is not defined: classes are absent"),
    ]
    with pytest.raises(ValueError, match="2 values of 120 samples"):
        rank_subgroups(checked_predictions(scores, labels, "multilabel"), {"site": ["x", "y"]})
