"""Steps, their records and the runner. Knows no imaging: a step is a name, a config and its inputs."""

from pipelines.flow.facts import Facts
from pipelines.flow.record import DriftError, Identity, Record
from pipelines.flow.runner import StepState, WorkflowError, plan_steps, run_steps
from pipelines.flow.step import Show, Step

__all__ = [
    "DriftError",
    "Facts",
    "Identity",
    "Record",
    "Show",
    "Step",
    "StepState",
    "WorkflowError",
    "plan_steps",
    "run_steps",
]
