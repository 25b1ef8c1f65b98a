"""What is fitted on validation predictions and used on all others: `calibration.json`.

A temperature, thresholds per class, and limits for prediction sets. It is stored next to a model's weights, not in
them: the digest of a model stays the same.
"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from medmamba.metrics.calibration import (
    fit_temperature,
    log_scores,
    negative_log_likelihood,
    with_temperature,
)
from medmamba.metrics.conformal import SetRule, fit_sets
from medmamba.metrics.operating import choose_threshold
from medmamba.metrics.predictions import Predictions, checked_predictions
from pipelines.evaluation.files import CALIBRATION
from pipelines.evaluation.predictions import StoredPredictions

MISS = 0.1
"""Share of labels that a prediction set may miss."""
SHARES = (0.8, 0.9, 0.95)
"""Sensitivities and specificities for which thresholds are chosen."""


class Threshold(BaseModel):
    """The threshold of one class for a sensitivity or a specificity that was wanted on validation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    rule: str
    threshold: float


class Calibrator(BaseModel):
    """How raw scores of one model become calibrated ones, and what may be said from them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: int = 1
    task: str
    classes: tuple[str, ...]
    model: str
    """Digest of the model."""
    manifest: str
    num_samples: int
    """Validation samples it was fitted on."""
    temperature: float
    nll_raw: float
    """Negative log-likelihood of validation, in nats per sample, before and after."""
    nll_calibrated: float
    thresholds: tuple[Threshold, ...]
    """On calibrated scores."""
    miss: float
    set_limits: tuple[float, ...]
    """Per class, on calibrated scores: a class is in an image's set from this score on."""
    set_limits_by_class: tuple[float, ...]

    def calibrated(self, logits_nC: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Probabilities (n, C) of logits (n, C)."""
        return with_temperature(logits_nC, self.temperature, self.task)

    def set_rules(self) -> tuple[SetRule, SetRule]:
        """The rules for prediction sets, of all classes together and by class."""
        return SetRule(self.set_limits, self.miss, False), SetRule(self.set_limits_by_class, self.miss, True)

    def to_json(self) -> bytes:
        """The file."""
        return json.dumps(self.model_dump(mode="json"), indent=1).encode()


def fit(validation: StoredPredictions) -> Calibrator:
    """The calibrator of a model's validation predictions; raises ValueError where there are none."""
    logits = logits_of(validation)
    temperature = fit_temperature(logits, validation.labels, validation.task)
    scores = with_temperature(logits, temperature, validation.task)
    predictions = checked_predictions(scores, validation.labels, validation.task, validation.group.tolist())
    return Calibrator(
        task=validation.task,
        classes=validation.classes,
        model=validation.model,
        manifest=validation.manifest,
        num_samples=len(validation),
        temperature=temperature,
        nll_raw=negative_log_likelihood(logits, validation.labels, validation.task),
        nll_calibrated=negative_log_likelihood(logits, validation.labels, validation.task, temperature),
        thresholds=_thresholds(predictions),
        miss=MISS,
        set_limits=fit_sets(predictions, miss=MISS).limits_C,
        set_limits_by_class=fit_sets(predictions, miss=MISS, by_class=True).limits_C,
    )


def read_calibrator(data: bytes, *, model: str = "") -> Calibrator:
    """The calibrator of a file.

    Raises ValueError where the file is damaged, or not of `model` (a digest) where that is given.
    """
    try:
        found = Calibrator.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{CALIBRATION} is damaged: evaluate and register the model again") from error
    if model and found.model != model:
        raise ValueError(
            f"{CALIBRATION} belongs to the model {found.model[:12]}, not to {model[:12]}: register the model again"
        )
    return found


def logits_of(stored: StoredPredictions) -> npt.NDArray[np.floating]:
    """The logits (n, C); of files without them, from the probabilities."""
    return log_scores(stored.scores, stored.task) if stored.logits is None else stored.logits


def _thresholds(predictions: Predictions) -> tuple[Threshold, ...]:
    """For each class and share the threshold, where validation has samples to choose it on."""
    found = []
    for number, truth_n in enumerate(predictions.truth_nC.T):
        for share in SHARES:
            if truth_n.any():
                at = choose_threshold(predictions, number, sensitivity=share)
                found.append(Threshold(number=number, rule=f"sensitivity {share:g}", threshold=at))
            if not truth_n.all():
                at = choose_threshold(predictions, number, specificity=share)
                found.append(Threshold(number=number, rule=f"specificity {share:g}", threshold=at))
    return tuple(found)
