"""Steps, their records and the runner. Knows no imaging: a step is a name, a config and its inputs."""

from pipelines.flow.record import DriftError, Identity, Record
from pipelines.flow.runner import StepState, WorkflowError, plan_steps, run_steps
from pipelines.flow.step import Step, StepContext

__all__ = [
    "DriftError",
    "Identity",
    "Record",
    "Step",
    "StepContext",
    "StepState",
    "WorkflowError",
    "plan_steps",
    "run_steps",
]
