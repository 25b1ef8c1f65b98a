"""Evaluation and records -> a page and a model card, in the store and in MLflow."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from data_shards.store import Store
from pipelines.placement import Placement
from pipelines.scratch import scratch
from pipelines.steps.context import StepContext


class ReportConfig(BaseModel):
    """What a report shows; not part of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    images: int = Field(12, ge=0, le=50)
    """Most images to show with the network's maps."""


def run(
    config: ReportConfig,
    placement: Placement | None,
    out: Store,
    context: StepContext,
    *,
    shard: dict,
    train: dict,
    evaluate: dict,
) -> dict:
    """Stores the page and the card, logs them to MLflow, and returns where they are.

    Raises ValueError where the predictions were changed after the evaluation.
    """
    from pipelines.report.make import JSON, PAGE, make_report

    place = f"runs/{context.run}/report"
    params = config.model_dump()
    with context.tracking.running(out, run=context.run, step="report", check=context.check, params=params) as run_id:
        found = make_report(context.store, context.run, images=config.images)
        found.write(out)
        with scratch("report") as folder:
            for name, data in found.files.items():
                (folder / name).write_bytes(data)
            context.tracking.log_files(run_id, folder)
    return {
        "digest": found.digest,
        "page": f"{place}/{PAGE}",
        "card": f"{place}/{JSON}",
        "size_bytes": len(found.files[PAGE]),
        "manifest": shard["digest"],
        "mlflow_run": run_id,
    }
