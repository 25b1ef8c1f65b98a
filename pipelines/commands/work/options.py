"""The options of the commands that run steps of a workflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

import tyro

from pipelines.console.command import Flag, JsonOption, StoreOption
from pipelines.placement import PlacementConfig
from pipelines.recipes import Recipe
from pipelines.tracking.leases import RUN_WAIT_S

BEHAVIOR = "Finished steps are skipped, an interrupted one resumes."
STEP_BEHAVIOR = f"Runs the steps it depends on first. {BEHAVIOR}"
Values = TypeVar("Values")
Where = TypeVar("Where")


@dataclass(frozen=True)
class Work(StoreOption, JsonOption, Generic[Values, Where]):
    """Their common options: a recipe's values, a placement, and where the result goes."""

    values: Annotated[Values, tyro.conf.arg(name="")]
    placement: Where
    """How and where the work runs; not part of a step's identity."""
    recipe: str = ""
    """Recipe to start from; its values are the defaults below. Empty: the one that the run was started with."""
    run: str = ""
    """Name of the run. It belongs to one configuration, and the same command resumes it. Empty: the recipe's name."""
    wait_s: float = RUN_WAIT_S
    """Seconds to wait while another driver works on this run; a driver that died is replaced automatically."""
    dry_run: Flag = False
    """Print the resolved configuration, the placement and the state of each step, and check that the images exist; run
    nothing."""


@dataclass(frozen=True)
class ProfiledWork(Work[Values, Where]):
    """The options of every command that may train."""

    profile: Flag = False
    """Profile a few steps of the training: print the largest kernels and the shares of GPU, host and data, and store a
    trace in the step's folder. The weights do not change; the epoch is slower."""


@dataclass(frozen=True)
class RunWork(ProfiledWork[Values, Where]):
    """The options of `run` and `quickstart`."""

    workflow: Annotated[
        tyro.conf.Positional[Literal["", "release", "direct"]], tyro.conf.arg(metavar="{release,direct}")
    ] = ""
    """release: shard, tune, train, evaluate, report, register, promote. direct: the same without the sweep.
    Empty: the run's own; for a new run release."""
    until: Annotated[
        Literal["", "shard", "tune", "train", "evaluate", "report", "register", "promote"],
        tyro.conf.arg(metavar="{shard,tune,train,evaluate,report,register,promote}"),
    ] = ""
    """Stop after this step. Empty: run to the end."""


@dataclass(frozen=True)
class StepWork(Work[Values, Where]):
    """The options of the commands for one step."""

    workflow: Annotated[Literal["", "release", "direct"], tyro.conf.arg(metavar="{release,direct}")] = ""
    """Workflow of the step. Empty: the run's own; for a new run direct, or release for tune."""


@dataclass(frozen=True)
class TrainWork(StepWork[Values, Where], ProfiledWork[Values, Where]):
    """Arguments of `train`."""

    max_minutes: float = 0.0
    """Stop at a checkpoint after this many minutes, counted from the start of the command, with exit code 0; the same
    command resumes. 0: train to the end."""


@dataclass(frozen=True)
class EvaluateWork(StepWork[Values, Where]):
    """Arguments of `evaluate`."""

    on: str = ""
    """DATASET or DATASET/NAME of the store: evaluate the run's model on it instead, as it is calibrated. Nothing of the
    run changes; the result is in the run's folder evaluate-on-DATASET-NAME."""
    class_map: str = ""
    """TOML file with "OTHER CLASS" = "OWN CLASS", or = "" to leave its images out, for --on. Classes it does not name
    must have equal names."""
    split: str = "test"
    """Split of the other dataset, for --on."""


@dataclass(frozen=True)
class PromoteWork(StepWork[Values, Where]):
    """Arguments of `promote`."""

    force: Flag = False
    """Move the alias even if the gate rejects, again each time it has moved elsewhere. Recorded on the version and as a
    step of its own: promote-forced, promote-forced-2, ..."""


Resolved = Work[Recipe, PlacementConfig]
"""The options of a command, with its recipe and placement as checked models."""


def is_profiled(work: Resolved) -> bool:
    """Whether the training is to be profiled."""
    return isinstance(work, ProfiledWork) and work.profile
