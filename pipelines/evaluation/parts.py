"""The parts of a study, as they are stored in `evaluation.json`.

Tables, pages and cards show what is here and compute nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.evaluation.files import STUDY


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Interval(_Part):
    """A figure with its 95 % interval by group; null where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    method: str = "none"


class ClassFigures(_Part):
    """The figures of one class, one against the rest."""

    name: str
    support: int
    """Samples of the class."""
    figures: dict[str, Interval]


class Curve(_Part):
    """ROC and precision-recall of one class; a point each per threshold, highest first."""

    name: str
    false_positive_rate: list[float]
    true_positive_rate: list[float]
    """Also the recall."""
    precision: list[float]


class ReliabilityBin(_Part):
    """Samples of similar confidence."""

    confidence: float
    observed: Interval
    count: int


class Reliability(_Part):
    """Expected calibration error and reliability curve."""

    error: Interval
    """Debiased."""
    plain_error: float
    curve: list[ReliabilityBin]


class CalibrationPart(_Part):
    """Calibration on test, as predicted and with the temperature fitted on validation."""

    raw: Reliability
    calibrated: Reliability | None = None
    temperature: float | None = None


class Point(_Part):
    """A threshold of one class, chosen on validation, with its figures on test."""

    name: str
    rule: str
    """For instance `sensitivity 0.95`."""
    threshold: float
    sensitivity: Interval
    specificity: Interval
    precision: Interval
    negative_value: Interval
    flagged: Interval


class Decision(_Part):
    """Decision curve of one class: net benefit by threshold, of the calibrated scores where there are any."""

    name: str
    threshold: list[float]
    model: list[float]
    low: list[float | None]
    high: list[float | None]
    treat_all: list[float]


class Sets(_Part):
    """Conformal prediction sets on test."""

    miss: float
    by_class: bool
    limits: list[float]
    coverage: Interval
    coverage_by_class: list[Interval]
    mean_size: float
    empty: Interval
    single: Interval


class Answering(_Part):
    """What is gained by answering only for confident images; the confidence was chosen on validation."""

    risk: float
    """The risk that was asked for."""
    confidence: float | None
    """null: no confidence has so small a risk on validation."""
    answered: Interval | None = None
    """Share of test images that are answered."""
    wrong: Interval | None = None
    """Share of wrong answers among them."""


class Abstaining(_Part):
    """Risk against coverage on test."""

    coverage: list[float]
    risk: list[float]
    area: float
    excess: float
    rules: list[Answering]


class Foreign(_Part):
    """Images with little evidence for any class: energy above the limit, which 5 % of validation exceed."""

    limit: float
    flagged: Interval


class SubgroupFigures(_Part):
    """Samples with one value of a metadata column."""

    column: str
    value: str
    num_samples: int
    num_groups: int
    figures: dict[str, Interval]
    unranked: str | None
    """Why it is not ranked; null where it is."""


class Study(_Part):
    """Everything that an evaluation says of a model on one test split."""

    format: int = 1
    task: str
    classes: list[str]
    split: str
    num_samples: int
    num_groups: int
    manifest: str
    model: str
    sample_size: str
    """One sentence on what a sample of this size can show."""
    macro: dict[str, Interval]
    averaged: dict[str, int]
    """Classes that a macro figure is the mean of."""
    by_class: list[ClassFigures]
    confusion: list[Any]
    """Counts, rows: labels, columns: predictions; multilabel: a 2x2 matrix per class."""
    curves: list[Curve]
    calibration: CalibrationPart
    operating_points: list[Point]
    decisions: list[Decision]
    sets: list[Sets]
    abstaining: Abstaining
    foreign: Foreign | None
    subgroups: list[SubgroupFigures]
    """Ranked ones first, worst first."""
    absent: dict[str, str] = Field(default_factory=dict)
    """Part -> why it was not computed."""


def read_study(data: bytes) -> Study:
    """The study of a file; raises ValueError where it is damaged."""
    try:
        return Study.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{STUDY} is damaged or of a later release: evaluate under another --run NAME") from error
