"""A connection to one experiment of one MLflow, and how long it waits for an MLflow that is away."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_shards.store.outage import Outage, outage_of, span
from pipelines.faults import RESUME
from pipelines.tracking.errors import AwayError, PatienceError, TrackingError, public_address, tracking_errors

# MLflow's own defaults need 248 s to give up on a server that does not answer. Two tries of 6 s stay below 15 s; what
# a person has set in the environment counts first.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "6",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0.5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
ONE_HOST_SCHEMES = ("sqlite", "file", "")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # between two attempts
Made = TypeVar("Made")


@dataclass(frozen=True)
class Client:
    """One experiment of one MLflow. Picklable; usable in the driver and in every worker.

    What is logged (metrics, parameters, tags, the end of a run) waits for an MLflow that is away, for up to
    `patience_s`, and says so (`data_shards.store.outage`); so does the begin of a run once this process has begun one.
    Everything else raises AwayError within 15 s.
    """

    uri: str = field(repr=False)  # it may hold a password
    experiment_id: str
    patience_s: float = 0.0

    @property
    def client(self) -> Any:
        """The MlflowClient of this process; call it inside `errors()`."""
        return mlflow_client(os.getpid(), self.uri)

    @property
    def address(self) -> str:
        """The uri without a password, for records and people."""
        return public_address(self.uri)

    def errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Turns what MLflow raises inside the block into a TrackingError."""
        return tracking_errors(self.uri, doing)

    def patiently(self, do: Callable[[], Made], *, kept: Callable[[], str] = lambda: "") -> Made:
        """What `do` returns; called again after growing pauses while MLflow is away.

        An attempt of which the answer was lost may have been carried out, so `do` must be something to be done twice.
        `kept` says, once MLflow is back, what was kept meanwhile and is sent now.

        Raises:
            AwayError: `patience_s` is 0 and MLflow is away.
            PatienceError: it was away for longer than `patience_s`.
            TrackingError: it refuses.
        """
        if not self.patience_s:
            return do()
        outage, pause_s = self._outage, FIRST_PAUSE_S
        while True:
            try:
                found = do()
            except AwayError as error:
                away_s = outage.failed(self.patience_s)
                if away_s + pause_s > self.patience_s:
                    raise PatienceError(self._gone(away_s)) from error
                time.sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 1.5 * pause_s)
            except PatienceError:
                raise
            except TrackingError:
                outage.answered()
                raise
            else:
                outage.answered(kept())
                return found

    @property
    def is_away(self) -> bool:
        """Whether this process waits for an MLflow that does not answer."""
        return self._outage.away_s > 0

    @property
    def _outage(self) -> Outage:
        return outage_of(f"MLflow at {self.address}", "work continues, and what it logs is kept and sent later")

    def _gone(self, away_s: float) -> str:
        began = time.strftime("%H:%M:%S", time.localtime(time.time() - away_s))
        return (
            f"MLflow at {self.address} has not answered since {began}, and the wait of {span(self.patience_s)} "
            f"(--placement.patience-s) is over: start it, then {RESUME}"
        )


@functools.lru_cache(maxsize=8)
def mlflow_client(pid: int, uri: str) -> Any:
    """The MlflowClient of this process for `uri`."""
    # MLflow reads the settings from the environment at each request; its migrations log at INFO.
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.db_migrations"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
