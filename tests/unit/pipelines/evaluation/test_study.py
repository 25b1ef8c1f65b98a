"""The study is computed from stored predictions alone, and agrees with what it was computed from."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from pipelines.evaluation.calibrator import Calibrator, fit, read_calibrator
from pipelines.evaluation.predictions import StoredPredictions, from_parquet, to_parquet
from pipelines.evaluation.study import CURVE_POINTS, Study, logged_figures, study


def drawn(task="multiclass", num=400, classes=3, seed=0, split="test", sharpness=2.0, groups=80, **other):
    """Predictions of a network that is right more often than not and too sure of itself."""
    draw = np.random.default_rng(seed)
    if task == "multilabel":
        labels = draw.integers(0, 2, (num, classes))
        logits = (2 * labels - 1 + draw.normal(0, 1.5, (num, classes))) * sharpness
        scores = 1 / (1 + np.exp(-logits))
    else:
        labels = np.eye(classes, dtype=np.int64)[draw.integers(0, classes, num)]
        logits = (labels + draw.normal(0, 0.8, (num, classes))) * 2 * sharpness
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    fields = {
        "key": np.array([f"{i:020x}" for i in range(num)]),
        "group": np.array([f"{i:020x}" for i in draw.integers(0, groups, num)]),
        "labels": labels.astype(np.uint8),
        "scores": scores.astype(np.float32),
        "logits": logits.astype(np.float32),
        "task": task,
        "classes": tuple("abcdefghij"[:classes]),
        "split": split,
        "manifest": "m" * 64,
        "model": "w" * 64,
        "metadata": {"height": np.full(num, 64), "site": draw.choice(["north", "south"], num)},
    }
    return StoredPredictions(**{**fields, **other})


@pytest.mark.parametrize("task", ["multiclass", "ordinal", "multilabel"])
def test_a_study_is_the_same_from_the_stored_files(task):
    test, validation = drawn(task), drawn(task, seed=1, split="val")
    found, calibrator = study(test, validation)
    again, calibrator_again = study(from_parquet(to_parquet(test)), from_parquet(to_parquet(validation)))
    assert found == again
    assert calibrator == calibrator_again
    assert Study.model_validate_json(found.model_dump_json()) == found
    assert not any(isinstance(value, float) and np.isnan(value) for value in _leaves(found.model_dump()))
    json.dumps(found.model_dump(), allow_nan=False)


def _leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def test_figures_and_curves_are_those_of_scikit_learn():
    test = drawn()
    found, _ = study(test, drawn(seed=1, split="val"))
    truth = test.labels.argmax(1)
    assert found.confusion == confusion_matrix(truth, test.scores.argmax(1)).tolist()
    for number, (figures, curve) in enumerate(zip(found.by_class, found.curves, strict=True)):
        auc = roc_auc_score(truth == number, test.scores[:, number])
        assert figures.figures["auc"].value == pytest.approx(auc, abs=1e-12)
        assert figures.support == int((truth == number).sum())
        area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
        assert area == pytest.approx(auc, abs=0.01)
        assert len(curve.precision) <= CURVE_POINTS + 1
        assert (curve.false_positive_rate[-1], curve.true_positive_rate[-1]) == (1, 1)
    assert all(each.low <= each.value <= each.high for each in found.macro.values())


def test_calibration_lowers_the_error_of_an_overconfident_network():
    found, calibrator = study(drawn(sharpness=4), drawn(seed=1, split="val", sharpness=4))
    assert calibrator.temperature > 1.5
    assert calibrator.nll_calibrated < calibrator.nll_raw
    assert found.calibration.calibrated.error.value < found.calibration.raw.error.value / 2


def test_thresholds_sets_and_abstaining_are_chosen_on_validation():
    validation = drawn(seed=1, split="val", num=1000)
    found, _ = study(drawn(num=1000), validation)
    at_95 = [point for point in found.operating_points if point.rule == "sensitivity 0.95"]
    assert [point.name for point in at_95] == ["a", "b", "c"]
    assert all(abs(point.sensitivity.value - 0.95) < 0.05 for point in at_95)
    assert abs(found.sets[0].coverage.value - 0.9) < 0.04
    assert [rule.risk for rule in found.abstaining.rules] == [0.01, 0.05, 0.1]
    other, _ = study(drawn(num=1000, seed=5), validation)
    assert [point.threshold for point in other.operating_points] == [p.threshold for p in found.operating_points]
    assert abs(found.foreign.flagged.value - 0.05) < 0.03


def test_a_planted_weak_subgroup_is_the_first():
    test = drawn(num=600)
    weak = test.metadata["site"] == "south"
    draw = np.random.default_rng(9)
    logits = test.logits.copy()
    logits[weak] = draw.normal(size=(int(weak.sum()), 3))
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found, _ = study(dataclasses.replace(test, logits=logits, scores=scores.astype(np.float32)))
    assert (found.subgroups[0].column, found.subgroups[0].value) == ("site", "south")
    assert found.subgroups[0].figures["auc"].value < 0.6
    assert {each.column for each in found.subgroups} == {"site"}, "a column with one value has no subgroups"


def test_without_validation_the_reason_is_given():
    test = drawn(logits=None)
    found, calibrator = study(test)
    assert calibrator is None
    assert found.calibration.calibrated is None
    assert found.operating_points == []
    assert found.sets == []
    assert set(found.absent) == {"validation", "foreign"}


def test_predictions_of_two_models_are_refused():
    with pytest.raises(ValueError, match="another model"):
        study(drawn(), drawn(seed=1, split="val", model="v" * 64))


def test_a_calibrator_is_read_back_for_its_model_only():
    calibrator = fit(drawn(split="val"))
    data = calibrator.to_json()
    assert read_calibrator(data, model="w" * 64) == calibrator
    assert isinstance(read_calibrator(data), Calibrator)
    with pytest.raises(ValueError, match="belongs to the model wwwwwwwwwwww"):
        read_calibrator(data, model="v" * 64)
    with pytest.raises(ValueError, match="is damaged"):
        read_calibrator(data[:-20])


def test_an_absent_class_has_figures_of_none():
    labels = drawn().labels.copy()
    labels[labels[:, 2] == 1] = [1, 0, 0]
    found, _ = study(drawn(labels=labels), drawn(seed=1, split="val"))
    assert found.by_class[2].support == 0
    assert found.by_class[2].figures["auc"].value is None
    assert "test_auc.c" not in logged_figures(found)
    assert logged_figures(found)["test_auc"] == found.macro["auc"].value
