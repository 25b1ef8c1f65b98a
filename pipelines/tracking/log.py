"""Logs metrics, parameters, tags and the end of an MLflow run by its id."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tracking.client import Client

PARAM_CHARACTERS = 6000  # MLflow's limit for a parameter value
BATCH_METRICS = 1000  # MLflow's limit of points per call
BATCH_ENTRIES = 100  # MLflow's limit of parameters or tags per call


@dataclass(frozen=True)
class RunLog(Client):
    """Logs by run id, from the driver and from every worker."""

    def log_metrics(
        self, run_id: str, metrics: Mapping[str, float], *, step: int = 0, at_ms: int | None = None
    ) -> None:
        """Adds one point to the curve of each metric, in one call.

        Sending a point again with the same `at_ms` (milliseconds since 1970; default: now) does not duplicate it.
        """
        self._log_points(run_id, [(name, float(value), step) for name, value in metrics.items()], at_ms or _now_ms())

    def log_epoch(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        step_losses: Sequence[float],
        *,
        at_ms: int | None = None,
        after_step: int = 0,
    ) -> None:
        """Logs an epoch: the loss of each optimizer step over steps, then `metrics` over epochs.

        `metrics` includes "epoch" (from 1) and "step" (optimizer steps made so far). Omits losses up to `after_step`
        and non-finite ones, which belong to skipped steps. For `at_ms` see `log_metrics`.
        """
        at_ms, first = at_ms or _now_ms(), int(metrics["step"]) - len(step_losses) + 1
        losses = [("step_loss", float(loss), step) for step, loss in enumerate(step_losses, first)]
        points = [point for point in losses if point[2] > after_step and math.isfinite(point[1])]
        for begin in range(0, len(points), BATCH_METRICS):
            self._log_points(run_id, points[begin : begin + BATCH_METRICS], at_ms)
        values = {name: value for name, value in metrics.items() if name not in ("epoch", "step")}
        self.log_metrics(run_id, values, step=int(metrics["epoch"]), at_ms=at_ms)

    def read_steps(self, run_id: str, name: str) -> list[int]:
        """The steps at which the run has points of the metric `name`."""

        def read() -> list[int]:
            with self.errors("cannot read metrics"):
                return [point.step for point in self.client.get_metric_history(run_id, name)]

        return self.patiently(read)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs nested mappings as dotted keys. Raises TrackingError if a parameter already has another value."""
        flat = [(key, str(value)[:PARAM_CHARACTERS]) for key, value in dotted(params).items()]

        def log() -> None:
            from mlflow.entities import Param

            with self.errors("cannot log parameters"):
                for first in range(0, len(flat), BATCH_ENTRIES):
                    entries = [Param(key, value) for key, value in flat[first : first + BATCH_ENTRIES]]
                    self.client.log_batch(run_id, params=entries)

        self.patiently(log)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets or replaces tags of a run."""

        def log() -> None:
            from mlflow.entities import RunTag

            with self.errors("cannot set tags"):
                self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

        self.patiently(log)

    def log_files(self, run_id: str, folder: Path) -> None:
        """Copies the files of a folder to the run's artifacts; files there with the same names are replaced."""

        def log() -> None:
            with self.errors("cannot upload files"):
                self.client.log_artifacts(run_id, str(folder))

        self.patiently(log)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        assert status in ("FINISHED", "FAILED", "KILLED"), status

        def end() -> None:
            with self.errors("cannot end the run"):
                self.client.set_terminated(run_id, status)

        self.patiently(end)

    def _log_points(self, run_id: str, points: Sequence[tuple[str, float, int]], at_ms: int) -> None:
        """Logs points (name, value, step) with the same timestamp in one call."""

        def log() -> None:
            from mlflow.entities import Metric

            with self.errors("cannot log metrics"):
                entries = [Metric(name, value, at_ms, step) for name, value, step in points]
                self.client.log_batch(run_id, metrics=entries)

        if points:
            self.patiently(log)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _now_ms() -> int:
    return int(time.time() * 1000)
