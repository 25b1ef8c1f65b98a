"""The search space of a sweep (`recipe.tune`), and the values that each trial tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.override import flatten, override
from pipelines.sweep.ledger import Ledger
from pipelines.sweep.suggestion import lies_in, suggest
from pipelines.worker.config import TrainStepConfig


class SearchSpace(BaseModel):
    """The values that a sweep tries. An empty one keeps the recipe's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lr: tuple[float, ...] = (3e-4, 5e-3)
    """Lowest and highest train.optim.lr, drawn log-uniformly."""
    weight_decay: tuple[float, ...] = (1e-5, 1e-1)
    """Lowest and highest train.optim.weight_decay, drawn log-uniformly."""
    drop_path: tuple[float, ...] = (0.0, 0.3)
    """Lowest and highest model.drop_path, drawn uniformly (MedMamba only)."""
    batch_size: tuple[int, ...] = ()
    """Values of train.batch_size to choose from; each a multiple of train.micro_batch."""

    @model_validator(mode="after")
    def _ordered(self) -> SearchSpace:
        for name in ("lr", "weight_decay", "drop_path"):
            bounds = getattr(self, name)
            if len(bounds) not in (0, 2):
                raise ValueError(
                    f"{name} {bounds}: give the lowest and the highest value, or nothing to keep the recipe's value"
                )
            if bounds and bounds[0] >= bounds[1]:
                raise ValueError(f"{name} {bounds}: the lowest value must be below the highest; swap them")
            if bounds and bounds[0] <= 0 and name != "drop_path":
                raise ValueError(f"{name} {bounds}: values drawn log-uniformly must be above 0; raise the lowest")
        return self

    def bounds(self, start: TrainStepConfig) -> dict[str, tuple[float, ...]]:
        """Dotted key of the recipe -> lowest and highest value, for searched keys that `start` has."""
        named = {
            "train.optim.lr": self.lr,
            "train.optim.weight_decay": self.weight_decay,
            "model.drop_path": self.drop_path,
        }
        own = flatten(start.model_dump())
        return {key: bounds for key, bounds in named.items() if bounds and key in own}


class TuneConfig(BaseModel):
    """How hyperparameters are searched (`recipe.tune`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trials: int = Field(8, ge=1)
    """Trials in the sweep. The first one uses the recipe's values, if they are in the space."""
    epochs: int = Field(5, ge=1)
    """Epochs of the longest trial."""
    grace_epochs: int = Field(1, ge=1)
    """Epochs every trial gets before ASHA may stop it."""
    reduction_factor: int = Field(3, ge=2)
    """At each rung, ASHA lets one in this many trials continue."""
    seed: int = Field(0, ge=0)
    """Seed of the search."""
    space: SearchSpace = SearchSpace()
    """The search space."""


class TuneStepConfig(BaseModel):
    """Identity of a sweep: the recipe that it starts from, and how it searches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: TrainStepConfig
    tune: TuneConfig

    @model_validator(mode="after")
    def _searchable(self) -> TuneStepConfig:
        for size in self.tune.space.batch_size:
            if size % self.start.train.micro_batch:
                raise ValueError(
                    f"tune.space.batch_size {size} is not a multiple of train.micro_batch "
                    f"{self.start.train.micro_batch}; choose multiples, or lower micro_batch"
                )
        searched = self.tune.space.bounds(self.start)
        if not searched and not self.tune.space.batch_size:
            raise ValueError(
                "tune.space is empty: give at least one field a range, or run the workflow without a sweep"
            )
        for key, bounds in searched.items():
            for bound in bounds:
                override(self.start, {key: bound})  # an impossible value must fail here, not in a trial
        return self


def search_space(config: TuneStepConfig) -> dict[str, Any]:
    """Dotted key of the recipe -> the distribution that Optuna draws it from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space = config.tune.space
    drawn: dict[str, Any] = {
        key: FloatDistribution(bounds[0], bounds[1], log=key != "model.drop_path")
        for key, bounds in space.bounds(config.start).items()
    }
    return drawn | ({"train.batch_size": CategoricalDistribution(space.batch_size)} if space.batch_size else {})


def chooser(
    config: TuneStepConfig, space: dict[str, Any], ledger: Ledger, say: Callable[[str], None]
) -> Callable[[int], dict[str, Any]]:
    """Returns a function from the number of a new trial to its overrides. `say` is for `recipe_point`."""
    begun = {record.number for record in ledger.records()}
    recipe = [] if 1 in begun else recipe_point(config, space, say)

    def choose(number: int) -> dict[str, Any]:
        if number == 1 and recipe:
            return recipe[0]
        return suggest(space, seed=config.tune.seed, number=number, over=ledger.over())

    return choose


def recipe_point(config: TuneStepConfig, space: dict[str, Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The recipe's own values as the first trial, if they are in the space: the sweep is never worse than the recipe.

    `say` gets a line if they are not.
    """
    own = flatten(config.start.model_dump())
    point = {key: own[key] for key in space}
    for key, value in point.items():
        if not lies_in(space[key], value):
            say(f"the recipe is not a trial of its sweep: its {key} {value:g} is outside tune.space")
            return []
    return [point]
