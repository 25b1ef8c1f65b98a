"""Which MLflow belongs to a store, whether it answers, and its experiment."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from data_shards.store import Store
from pipelines.tracking.client import ONE_HOST_SCHEMES, mlflow_client
from pipelines.tracking.errors import TrackingError, public_address, tracking_errors, unreachable
from pipelines.tracking.runs import Tracking

EXPERIMENT = "medmamba"


def check_tracking(store: Store, uri: str | None = None) -> str:
    """The address that `open_tracking` will connect to; TrackingError, within 5 s, where it cannot serve this store or
    nothing answers. MLflow is not imported."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(store)
    if not store.is_local and urlsplit(uri).scheme in ONE_HOST_SCHEMES:
        raise TrackingError(
            f"MLflow at {uri} serves one host, but the store {store.uri} serves many: start `mlflow server` and set "
            "MLFLOW_TRACKING_URI to its address"
        )
    _probe(uri)
    return uri


def open_tracking(store: Store, uri: str | None = None) -> Tracking:
    """Connects to `uri`, MLFLOW_TRACKING_URI or, for a local store, to a SQLite file in it; makes the experiment.

    To be called by the driver before any worker logs: several processes that open a fresh SQLite file at once break
    each other's migrations. Artifacts lie under the store; only where a server meets a store in a local folder, which
    it cannot read, they lie where the server keeps its own. Raises TrackingError within 15 s.
    """
    uri = check_tracking(store, uri)
    on_server = urlsplit(uri).scheme not in ONE_HOST_SCHEMES
    # A server may serve several stores; runs of equal names in two of them must not meet.
    name = EXPERIMENT if not on_server else f"{EXPERIMENT} {_host(store)}{store.uri}"
    artifacts = None if on_server and store.is_local else f"{_as_uri(store)}/mlflow-artifacts"
    with contextlib.nullcontext() if on_server else _alone(store), tracking_errors(uri, "cannot open the experiment"):
        return Tracking(uri, _experiment(mlflow_client(os.getpid(), uri), name, artifacts))


def _probe(uri: str) -> None:
    """Raises TrackingError within 5 s where nothing answers; importing MLflow alone takes seconds more."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    parts = urlsplit(public_address(uri))
    try:
        urllib.request.urlopen(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/health")), timeout=5).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it is an MLflow that lets us in shows at the first call
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise TrackingError(unreachable(uri, str(reason))) from error


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} has been deleted: bring it back with `mlflow experiments restore -x "
            f"{found.experiment_id}`, or remove it for good with `mlflow gc`"
        )
    return found.experiment_id


def _sqlite_uri(store: Store) -> str:
    path = store.path("mlflow.db")
    if path is None:
        raise TrackingError(
            f"the store {store.uri} is shared, and runs cannot be kept in a file beside it: start `mlflow server` and "
            "set MLFLOW_TRACKING_URI to its address"
        )
    return f"sqlite:///{path}"


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """One process at a time on this host: two that migrate a fresh SQLite file at once break it."""
    import fcntl

    path = store.path(".mlflow.lock")
    assert path is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise TrackingError(
            f"{store.uri} is not a folder that MLflow's file can be written to ({error.strerror}): use another store"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _host(store: Store) -> str:
    """The same folder name on two machines is two stores."""
    return f"{socket.gethostname()}:" if store.is_local else ""


def _as_uri(store: Store) -> str:
    return Path(store.uri).as_uri() if store.is_local else store.uri
