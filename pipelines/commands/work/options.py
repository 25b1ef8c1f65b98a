"""What the commands take that bring steps to done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

import tyro

from pipelines.console.command import Flag, JsonOption, StoreOption
from pipelines.placement import PlacementConfig
from pipelines.recipes import Recipe
from pipelines.tracking.leases import RUN_WAIT_S

BEHAVIOUR = "What it needs is brought to done first: finished steps are skipped, an interrupted one resumes."
Values = TypeVar("Values")
Where = TypeVar("Where")


@dataclass(frozen=True)
class Work(StoreOption, JsonOption, Generic[Values, Where]):
    """What each of them takes: a recipe's values, a placement, and where the result goes."""

    values: Annotated[Values, tyro.conf.arg(name="")]
    placement: Where
    """How and where; never part of what is made."""
    recipe: str = ""
    """Recipe to start from; its values are the defaults below. Empty: what the run was begun with."""
    run: str = ""
    """Name of the run: it stands for one configuration, and the same command resumes it. Empty: the recipe's name."""
    wait_s: float = RUN_WAIT_S
    """Seconds to wait for another driver of this run that is alive; one that died is replaced without being asked."""
    dry_run: Flag = False
    """Print the resolved configuration and placement and the state of each step, and look for the images; run
    nothing."""


@dataclass(frozen=True)
class ProfiledWork(Work[Values, Where]):
    """What every command takes that may train."""

    profile: Flag = False
    """Look into a few steps of the training: print the largest kernels and the shares of GPU, host and data, and keep
    a trace in the step's folder. The weights are the same; the epoch is slower."""


@dataclass(frozen=True)
class RunWork(ProfiledWork[Values, Where]):
    """What `run` and `quickstart` take."""

    workflow: Annotated[
        tyro.conf.Positional[Literal["", "release", "direct"]], tyro.conf.arg(metavar="{release,direct}")
    ] = ""
    """release: shard, tune, train, evaluate, register, promote. direct: the same without the sweep.
    Empty: the run's; for a new run release."""
    until: Annotated[
        Literal["", "shard", "tune", "train", "evaluate", "register", "promote"],
        tyro.conf.arg(metavar="{shard,tune,train,evaluate,register,promote}"),
    ] = ""
    """Stop after this step. Empty: go on to the end."""


@dataclass(frozen=True)
class StepWork(Work[Values, Where]):
    """What the command of one step takes."""

    workflow: Annotated[Literal["", "release", "direct"], tyro.conf.arg(metavar="{release,direct}")] = ""
    """Which workflow the step belongs to. Empty: the run's; for a new run direct, or release for tune."""


@dataclass(frozen=True)
class TrainWork(StepWork[Values, Where], ProfiledWork[Values, Where]):
    """What `train` takes."""

    max_minutes: float = 0.0
    """End at a checkpoint after so many minutes, counted from the start of the command, with exit code 0; the same
    command resumes. 0: train to the end."""


@dataclass(frozen=True)
class PromoteWork(StepWork[Values, Where]):
    """What `promote` takes."""

    force: Flag = False
    """Move the alias although the gate said no, each time it has gone elsewhere. Kept on the version, and as a step of
    its own: promote-forced, promote-forced-2, ..."""


Resolved = Work[Recipe, PlacementConfig]
"""The options of a command with the recipe and the placement that they were read as."""


def is_profiled(work: Resolved) -> bool:
    """Whether a profile of the training is wanted."""
    return isinstance(work, ProfiledWork) and work.profile
