"""What a sweep tries next: a function of its seed, the trial's number and the trials that are over.

Optuna's sampler keeps the state of its random numbers in memory. Here each trial has numbers of its own and the study
is built from the records, so a sweep that was interrupted suggests what it would have suggested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pipelines.sweep.ledger import TrialRecord


def suggest(space: Mapping[str, Any], *, seed: int, number: int, over: Iterable[TrialRecord]) -> dict[str, Any]:
    """Dotted key of the recipe -> value. `space` maps the keys to Optuna's distributions; `over` are the trials that
    Optuna knows, by their numbers."""
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
    """Whether a sweep may try this value."""
    if hasattr(distribution, "choices"):
        return value in distribution.choices
    return distribution.low <= value <= distribution.high


def misfit(record: TrialRecord, space: Mapping[str, Any], *, trials: int, epochs: int) -> str:
    """Why a record cannot be one of a sweep over this space, with so many trials of so many epochs; empty if it can."""
    if record.number > trials or len(record.epochs) > epochs:
        return f"a sweep of {trials} trials of {epochs} epochs has none like it"
    if record.overrides.keys() != space.keys():
        return "its overrides are not the fields that are searched"
    outside = [key for key, value in record.overrides.items() if not lies_in(space[key], value)]
    return f"its {outside[0]} is outside tune.space" if outside else ""
