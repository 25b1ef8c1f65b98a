"""Stored predictions -> the study: every figure, interval and curve of an evaluation as plain JSON.

Tables, pages and cards show what is here and compute nothing. A part that cannot be computed is null; `absent` has the
reason. Curves have at most `CURVE_POINTS` points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from medmamba.metrics.abstaining import choose_confidence, confidences, energy, energy_limit, risk_curve
from medmamba.metrics.calibration import Calibration, calibration, with_temperature
from medmamba.metrics.confidence import Estimate
from medmamba.metrics.conformal import SetFigures, SetRule, measure_sets
from medmamba.metrics.estimates import estimate, what_it_can_show
from medmamba.metrics.operating import OperatingPoint, at_threshold, decision_curve, share
from medmamba.metrics.predictions import Predictions, checked_predictions
from medmamba.metrics.subgroups import rank_subgroups
from pipelines.evaluation.calibrator import Calibrator, fit, logits_of
from pipelines.evaluation.parts import (
    Abstaining,
    Answering,
    CalibrationPart,
    ClassFigures,
    Curve,
    Decision,
    Foreign,
    Interval,
    Point,
    Reliability,
    ReliabilityBin,
    Sets,
    Study,
    SubgroupFigures,
)
from pipelines.evaluation.predictions import StoredPredictions

CURVE_POINTS = 200
RISKS = (0.01, 0.05, 0.1)
"""Shares of wrong answers for which a study says how many images may be answered."""


def study(
    test: StoredPredictions, validation: StoredPredictions | None = None, *, on_other_data: bool = False
) -> tuple[Study, Calibrator | None]:
    """The study of a test split, and the calibrator that was fitted on validation.

    With `on_other_data` the test split is of another dataset than the model was trained and validated on.

    Without validation predictions (evaluations of earlier releases have none) there is no calibrator, and `absent` has
    the reason.

    Raises:
        ValueError: test and validation are of different models or datasets, or the test split is empty.
    """
    _check_pair(test, validation, on_other_data)
    absent = {}
    if validation is None or not len(validation):
        absent["validation"] = "no validation predictions: run `medmamba evaluate` under another run"
    calibrator = fit(validation) if validation is not None and len(validation) else None
    raw = checked(test)
    scores = raw if calibrator is None else checked(test, calibrator.temperature)
    if test.logits is None:
        absent["foreign"] = "the predictions have no logits: they are of an earlier release"
    estimates = estimate(raw)
    return Study(
        task=test.task,
        classes=list(test.classes),
        split=test.split,
        num_samples=len(test),
        num_groups=estimates.num_groups,
        manifest=test.manifest,
        model=test.model,
        sample_size=what_it_can_show(estimates, groups="groups"),
        macro=_intervals(estimates.macro),
        averaged=dict(estimates.figures.averaged),
        by_class=[
            ClassFigures(name=name, support=support, figures=_intervals(figures))
            for name, support, figures in zip(test.classes, estimates.figures.support, estimates.classes, strict=True)
        ],
        confusion=estimates.figures.confusion.tolist(),
        curves=[_curve(name, raw, number) for number, name in enumerate(test.classes)],
        calibration=CalibrationPart(
            raw=_reliability(calibration(raw)),
            calibrated=None if calibrator is None else _reliability(calibration(scores)),
            temperature=None if calibrator is None else calibrator.temperature,
        ),
        operating_points=_points(calibrator, scores, test.classes),
        decisions=[_decision(name, scores, number) for number, name in enumerate(test.classes)],
        sets=[] if calibrator is None else [_sets(rule, scores) for rule in calibrator.set_rules()],
        abstaining=_abstaining(scores, validation, calibrator),
        foreign=_foreign(test, validation),
        subgroups=_subgroups(test, raw),
        absent=absent,
    ), calibrator


def logged_figures(found: Study) -> dict[str, float]:
    """The figures as MLflow gets them: all with their bounds, and those of each class (`test_auc.CLASS`)."""
    logged: dict[str, float] = {}
    for name, each in found.macro.items():
        parts = {"": each.value, "_low": each.low, "_high": each.high}
        logged |= {f"test_{name}{part}": value for part, value in parts.items() if value is not None}
    for figures in found.by_class:
        word = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in figures.name)
        for name in ("auc", "sensitivity", "specificity", "precision", "f1"):
            value = figures.figures[name].value
            if value is not None:
                logged[f"test_{name}.{word}"] = value
    return logged


def checked(stored: StoredPredictions, temperature: float | None = None) -> Predictions:
    """Stored predictions as the statistics take them, with `temperature` calibrated."""
    scores = stored.scores if temperature is None else with_temperature(logits_of(stored), temperature, stored.task)
    return checked_predictions(scores, stored.labels, stored.task, stored.group.tolist())


def _check_pair(test: StoredPredictions, validation: StoredPredictions | None, on_other_data: bool) -> None:
    if validation is None:
        return
    for name in ("model", *(() if on_other_data else ("manifest",)), "classes", "task"):
        if getattr(test, name) != getattr(validation, name):
            raise ValueError(
                f"test and validation predictions have another {name}: they are of two evaluations; run "
                "`medmamba evaluate` under another run"
            )


def _interval(estimate: Estimate) -> Interval:
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high, method=estimate.method)


def _intervals(estimates: Mapping[str, Estimate]) -> dict[str, Interval]:
    return {name: _interval(each) for name, each in estimates.items()}


def _curve(name: str, predictions: Predictions, number: int) -> Curve:
    score_n, truth_n = predictions.scores_nC[:, number], predictions.truth_nC[:, number]
    order = np.argsort(-score_n, kind="stable")
    last = np.flatnonzero(np.diff(score_n[order], append=-np.inf))  # the end of each run of equal scores
    hits, called = np.cumsum(truth_n[order])[last], last + 1
    positives, negatives = int(truth_n.sum()), int((~truth_n).sum())
    keep = _spread(len(last))
    return Curve(
        name=name,
        false_positive_rate=[0.0, *((called - hits)[keep] / max(1, negatives)).tolist()],
        true_positive_rate=[0.0, *(hits[keep] / max(1, positives)).tolist()],
        precision=[1.0, *(hits[keep] / called[keep]).tolist()],
    )


def _spread(num: int) -> npt.NDArray[np.int64]:
    """Positions of at most CURVE_POINTS of `num` points, both ends among them."""
    return np.unique(np.linspace(0, num - 1, min(num, CURVE_POINTS)).round().astype(np.int64))


def _reliability(found: Calibration) -> Reliability:
    bins = [
        ReliabilityBin(confidence=each.confidence, observed=_interval(each.observed), count=each.count)
        for each in found.curve
    ]
    return Reliability(error=_interval(found.error), plain_error=found.plain_error, curve=bins)


def _points(calibrator: Calibrator | None, scores: Predictions, classes: Sequence[str]) -> list[Point]:
    if calibrator is None:
        return []
    return [
        _point(classes[each.number], each.rule, at_threshold(scores, each.number, each.threshold))
        for each in calibrator.thresholds
    ]


def _point(name: str, rule: str, found: OperatingPoint) -> Point:
    shares = ("sensitivity", "specificity", "precision", "negative_value", "flagged")
    return Point(
        name=name, rule=rule, threshold=found.threshold, **{each: _interval(getattr(found, each)) for each in shares}
    )


def _decision(name: str, scores: Predictions, number: int) -> Decision:
    found = decision_curve(scores, number)
    return Decision(
        name=name,
        threshold=found.thresholds_t.tolist(),
        model=found.model_t.tolist(),
        low=_finite(found.low_t),
        high=_finite(found.high_t),
        treat_all=found.treat_all_t.tolist(),
    )


def _finite(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _sets(rule: SetRule, scores: Predictions) -> Sets:
    found: SetFigures = measure_sets(rule, scores)
    return Sets(
        miss=rule.miss,
        by_class=rule.by_class,
        limits=list(rule.limits_C),
        coverage=_interval(found.coverage),
        coverage_by_class=[_interval(each) for each in found.coverage_by_class],
        mean_size=found.mean_size,
        empty=_interval(found.empty),
        single=_interval(found.single),
    )


def _abstaining(scores: Predictions, validation: StoredPredictions | None, calibrator: Calibrator | None) -> Abstaining:
    curve = risk_curve(scores)
    keep = _spread(len(curve.coverage_k))
    rules = []
    if validation is not None and calibrator is not None:
        chosen_on = checked(validation, calibrator.temperature)
        rules = [_answering(risk, choose_confidence(chosen_on, risk), scores) for risk in RISKS]
    return Abstaining(
        coverage=curve.coverage_k[keep].tolist(),
        risk=curve.risk_k[keep].tolist(),
        area=curve.area,
        excess=curve.excess,
        rules=rules,
    )


def _answering(risk: float, confidence: float | None, scores: Predictions) -> Answering:
    if confidence is None:
        return Answering(risk=risk, confidence=None)
    answered = confidences(scores) >= confidence
    if scores.task == "multilabel":
        wrong = (scores.truth_nC != scores.guesses_nC).any(1)
    else:
        wrong = ~(scores.truth_nC & scores.guesses_nC).any(1)
    everyone = np.ones(len(scores), dtype=bool)
    return Answering(
        risk=risk,
        confidence=confidence,
        answered=_interval(share(scores, answered, everyone)),
        wrong=_interval(share(scores, wrong, answered)),
    )


def _foreign(test: StoredPredictions, validation: StoredPredictions | None) -> Foreign | None:
    if test.logits is None or validation is None or validation.logits is None or not len(validation):
        return None
    limit = energy_limit(energy(validation.logits, test.task))
    flagged = energy(test.logits, test.task) > limit
    found = share(checked(test), flagged, np.ones(len(test), dtype=bool))
    return Foreign(limit=limit, flagged=_interval(found))


def _subgroups(test: StoredPredictions, predictions: Predictions) -> list[SubgroupFigures]:
    columns = {name: values.tolist() for name, values in test.metadata.items()}
    varied = {name: values for name, values in columns.items() if len(set(values)) > 1}
    return [
        SubgroupFigures(
            column=each.column,
            value=each.value,
            num_samples=each.estimates.num_samples,
            num_groups=each.estimates.num_groups,
            figures=_intervals(each.estimates.macro),
            unranked=each.unranked,
        )
        for each in rank_subgroups(predictions, varied)
    ]
