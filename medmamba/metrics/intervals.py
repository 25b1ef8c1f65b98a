"""A metric -> its 95 % bootstrap interval, resampling patients (groups), not images.

Images of one patient are not independent: an interval over images would be too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def bootstrap_interval(
    scores_nC: np.ndarray,
    labels_nC: np.ndarray,
    metric: Callable[[np.ndarray, np.ndarray], float],
    groups: Sequence[str | None] | None = None,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) percentiles of `metric(scores, labels)` over resamples of the groups.

    A sample whose group is None stands for itself. A resample that misses a class is drawn again, so the interval
    is conditional on every class being there; ValueError where fewer than one draw in ten has all classes.
    """
    members = _members(groups, len(labels_nC))
    generator = np.random.default_rng(seed)
    values: list[float] = []
    for _ in range(10 * num_resamples):
        drawn = generator.integers(len(members), size=len(members))
        rows = np.concatenate([members[i] for i in drawn])
        positives = labels_nC[rows].sum(0, dtype=np.int64)
        if positives.all() and (positives < len(rows)).all():
            values.append(metric(scores_nC[rows], labels_nC[rows]))
        if len(values) == num_resamples:
            tail = 50 * (1 - confidence)
            low, high = np.percentile(values, [tail, 100 - tail])
            return float(low), float(high)
    raise ValueError(
        f"only {len(values)} of {10 * num_resamples} resamples of {len(members)} groups have every class: "
        "too few groups for an interval; report the figure without one"
    )


def _members(groups: Sequence[str | None] | None, num_samples: int) -> list[np.ndarray]:
    """Row numbers of each group, in order of first appearance."""
    if groups is None:
        return [np.array([row]) for row in range(num_samples)]
    assert len(groups) == num_samples, (len(groups), num_samples)
    rows: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault((row,) if group is None else group, []).append(row)
    return [np.array(members) for members in rows.values()]
