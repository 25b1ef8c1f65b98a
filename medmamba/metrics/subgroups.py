"""The figures of parts of the samples, by any metadata column, worst part first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from medmamba.metrics.confidence import Estimate
from medmamba.metrics.estimates import Estimates, estimate
from medmamba.metrics.predictions import Predictions

MISSING = "missing"
_FEW_VALUES = 5  # a numeric column with at most so many is a column of names


@dataclass(frozen=True)
class Subgroup:
    """Samples with one value of one column."""

    column: str
    value: str
    """The value, a range of numbers, or "missing"."""
    estimates: Estimates
    figure: Estimate
    """The macro figure that subgroups are ranked by."""
    unranked: str | None
    """Why the subgroup is not ranked, or None where it is."""


def rank_subgroups(
    predictions: Predictions,
    columns: Mapping[str, Sequence[object]],
    *,
    by: str = "auc",
    least_samples: int = 30,
    least_groups: int = 10,
) -> list[Subgroup]:
    """Every value of every column with its figures: the ranked ones first, worst first, then the others by size.

    Args:
        predictions: Of n samples.
        columns: Name -> n values. Numbers with more than five distinct values are parted into tertiles; None, NaN and
            empty text are a value of their own, "missing".
        by: One of `FIGURES`; worst is smallest, for brier largest.
        least_samples: A subgroup with fewer is listed, not ranked.
        least_groups: As well one with fewer independent groups.

    Raises:
        ValueError: a column that has not n values.
    """
    found = []
    for column, values in columns.items():
        if len(values) != len(predictions):
            raise ValueError(
                f"column {column!r} has {len(values)} values of {len(predictions)} samples: must be one each"
            )
        names_n = np.array(name_values(values), dtype=object)
        for name in dict.fromkeys(names_n):
            estimates = estimate(predictions.rows(np.flatnonzero(names_n == name)))
            figure = estimates.macro[by]
            reason = _unranked(estimates, figure, by, least_samples, least_groups)
            found.append(Subgroup(column, name, estimates, figure, reason))
    sign = -1 if by == "brier" else 1
    ranked = sorted(
        (each for each in found if each.unranked is None), key=lambda each: sign * (each.figure.value or 0.0)
    )
    others = sorted((each for each in found if each.unranked), key=lambda each: -each.estimates.num_samples)
    return ranked + others


def name_values(values: Sequence[object]) -> list[str]:
    """The subgroup of each value: its text, the tertile of a number, or "missing"."""
    present = [value for value in values if not _is_missing(value)]
    numbers = [number for value in present if (number := _number(value)) is not None]
    if len(numbers) != len(present) or len(set(numbers)) <= _FEW_VALUES:
        return [MISSING if _is_missing(value) else str(value) for value in values]
    edges = np.unique(np.quantile(numbers, [1 / 3, 2 / 3], method="inverted_cdf"))
    bounds = [min(numbers), *edges.tolist(), max(numbers)]
    names = [f"{bounds[0]:g} to {bounds[1]:g}"]
    names += [f"above {low:g} to {high:g}" for low, high in pairwise(bounds[1:])]
    at = np.searchsorted(edges, [_number(value) or 0.0 for value in values])
    return [MISSING if _is_missing(value) else names[where] for value, where in zip(values, at, strict=True)]


def _unranked(estimates: Estimates, figure: Estimate, by: str, least_samples: int, least_groups: int) -> str | None:
    if estimates.num_samples < least_samples:
        return f"{estimates.num_samples} samples, fewer than {least_samples}"
    if estimates.num_groups < least_groups:
        return f"{estimates.num_groups} groups, fewer than {least_groups}"
    return f"{by} is not defined: classes are absent" if figure.value is None else None


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return float(value) if is_number and not _is_missing(value) else None  # type: ignore[arg-type]


def _is_missing(value: object) -> bool:
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    return value is None or value == ""
