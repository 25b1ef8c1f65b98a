"""What the remaining steps of a run require of its placement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_shards.store import Store
from pipelines.flow import StepState
from pipelines.flow.runner import step_folder
from pipelines.override import override
from pipelines.placement import Demand, Placement
from pipelines.recipes import Recipe
from pipelines.steps.train import begun_training
from pipelines.worker.config import TrainConfig
from pipelines.worker.engine.first_format import check_placement

OF_CHECKPOINT = ("zero_stage", "compile")
OF_OLD_CHECKPOINT = (*OF_CHECKPOINT, "ranks", "flat")


class RunDemand:
    """The trainings that a run may still start, and the checkpoint that its training resumes from."""

    def __init__(self, recipe: Recipe, states: Sequence[StepState], store: Store, run: str) -> None:
        by_name = {state.name: state for state in states}
        train = by_name.get("train")
        self._trainings = _possible_trainings(recipe, by_name) if train and train.state != "done" else []
        begun = train is not None and train.state in ("interrupted", "failed")
        self._checkpoint: dict[str, Any] | None = None
        self._is_old = False  # it resumes only on as many ranks, and at the ZeRO stage, that wrote it
        if begun:
            self._checkpoint, self._is_old = begun_training(step_folder(store, run, "train"))

    def for_placement(self) -> Demand:
        """What `auto` must know to choose a number of workers that the run can finish with."""
        if not self._trainings:
            return Demand()
        sizes = [training.batch_size for training in self._trainings]
        names = OF_OLD_CHECKPOINT if self._is_old else OF_CHECKPOINT
        kept = {name: value for name, value in (self._checkpoint or {}).items() if name in names}
        name = "batch size" if len(sizes) == 1 else "batch sizes"
        return Demand(
            micro_batches=math.gcd(*(training.accumulation(1) for training in self._trainings)),
            batches=f"{name} {', '.join(map(str, sizes))} in micro-batches of {self._trainings[0].micro_batch}",
            **kept,
        )

    def check(self, placement: Placement) -> None:
        """Raises ValueError if the workers do not divide a batch or cannot resume the checkpoint exactly.

        Checked now, because the workers would only find out after the sweep.
        """
        for training in self._trainings:
            training.accumulation(placement.workers)
            if placement.workers_min:
                training.accumulation(placement.workers_min)
        if self._checkpoint and self._is_old:
            check_placement(self._checkpoint, placement)


def _possible_trainings(recipe: Recipe, states: Mapping[str, StepState]) -> list[TrainConfig]:
    """The recipe's training, or one per batch size that the sweep has chosen or may choose."""
    tune = states.get("tune")
    if tune is None:
        sizes: Sequence[int] = ()
    elif tune.record is not None:
        winner = tune.record.facts["winner"]
        sizes = (winner["train.batch_size"],) if "train.batch_size" in winner else ()
    else:
        sizes = recipe.tune.space.batch_size
    return [override(recipe, {"train.batch_size": size}).train for size in sizes] or [recipe.train]
