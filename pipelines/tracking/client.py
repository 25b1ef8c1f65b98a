"""A connection to one MLflow experiment, with a limit on how long to wait for an unavailable MLflow."""

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

# With MLflow's defaults it takes 248 s to give up on a server that does not answer; two tries of 6 s stay below 15 s.
# Values that the user has set in the environment win.
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
    """One MLflow experiment. Picklable; usable in the driver and in every worker.

    Logging (metrics, parameters, tags, the end of a run) waits up to `patience_s` for an unavailable MLflow and
    reports the outage (`data_shards.store.outage`). So does starting a run, once this process has started one. All
    other calls raise AwayError within 15 s.
    """

    uri: str = field(repr=False)  # may contain a password
    experiment_id: str
    patience_s: float = 0.0

    @property
    def client(self) -> Any:
        """The MlflowClient of this process; call it inside `errors()`."""
        return mlflow_client(os.getpid(), self.uri)

    @property
    def address(self) -> str:
        """The URI without user and password, for records and messages."""
        return public_address(self.uri)

    def errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Context that converts MLflow's exceptions into TrackingError."""
        return tracking_errors(self.uri, doing)

    def patiently(self, do: Callable[[], Made], *, kept: Callable[[], str] = lambda: "") -> Made:
        """Returns `do()`, retried with growing pauses while MLflow is unavailable.

        `do` must be idempotent, because an attempt whose answer was lost may have succeeded. `kept` is called once
        MLflow is back and returns what was queued meanwhile, for the message.

        Raises:
            AwayError: `patience_s` is 0 and MLflow is unavailable.
            PatienceError: MLflow was unavailable for longer than `patience_s`.
            TrackingError: MLflow rejected the call.
        """
        if not self.patience_s:
            return do()
        outage, pause_s = self._outage, FIRST_PAUSE_S
        while True:
            try:
                result = do()
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
                return result

    @property
    def is_away(self) -> bool:
        """Whether this process is waiting for an unavailable MLflow."""
        return self._outage.away_s > 0

    @property
    def _outage(self) -> Outage:
        return outage_of(f"MLflow at {self.address}", "work continues; log entries are kept and sent later")

    def _gone(self, away_s: float) -> str:
        began = time.strftime("%H:%M:%S", time.localtime(time.time() - away_s))
        return (
            f"MLflow at {self.address} has not answered since {began}, longer than {span(self.patience_s)} "
            f"(--placement.patience-s): start it, then {RESUME}"
        )


@functools.lru_cache(maxsize=8)
def mlflow_client(pid: int, uri: str) -> Any:
    """The MlflowClient of this process for `uri`."""
    # MLflow reads these variables at each request.
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.db_migrations"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
