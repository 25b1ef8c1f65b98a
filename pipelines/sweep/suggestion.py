"""Suggests a trial's hyperparameters as a function of the sweep's seed, the trial's number and the completed trials.

Optuna's sampler keeps its random state in memory. Here each trial has its own seed and the study is rebuilt from the
records, so an interrupted sweep makes the same suggestions as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pipelines.sweep.ledger import TrialRecord


def suggest(space: Mapping[str, Any], *, seed: int, number: int, over: Iterable[TrialRecord]) -> dict[str, Any]:
    """Returns {dotted recipe key: value} for trial `number`.

    `space` maps keys to Optuna distributions; `over` are the completed trials, by number.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=drawn))
    for record in over:
        if record.state != "diverged" and record.epochs:
            study.add_trial(
                optuna.trial.create_trial(
                    value=record.last["val_auc"], params=dict(record.overrides), distributions=dict(space)
                )
            )
    return dict(study.ask(fixed_distributions=dict(space)).params)


def lies_in(distribution: Any, value: Any) -> bool:
    """Whether the value is within an Optuna distribution."""
    if hasattr(distribution, "choices"):
        return value in distribution.choices
    return distribution.low <= value <= distribution.high


def misfit(record: TrialRecord, space: Mapping[str, Any], *, trials: int, epochs: int) -> str:
    """Why a record cannot belong to a sweep with this space and these limits; empty if it can."""
    if record.number > trials or len(record.epochs) > epochs:
        return f"the sweep has only {trials} trials of {epochs} epochs"
    if record.overrides.keys() != space.keys():
        return "its overrides are not the searched fields"
    outside = [key for key, value in record.overrides.items() if not lies_in(space[key], value)]
    return f"its {outside[0]} is outside tune.space" if outside else ""
