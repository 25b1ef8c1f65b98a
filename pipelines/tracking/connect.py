"""Finds the MLflow server of a store, checks that it answers, and opens its experiment."""

from __future__ import annotations

import contextlib
import fcntl
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
    """Returns the address that `open_tracking` will connect to, without importing MLflow.

    Raises TrackingError within 5 s if it cannot serve this store or does not answer.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(store)
    if not store.is_local and urlsplit(uri).scheme in ONE_HOST_SCHEMES:
        raise TrackingError(
            f"MLflow at {uri} is only reachable from one host, but the store {store.uri} is shared: start "
            "`mlflow server` and set MLFLOW_TRACKING_URI to its address"
        )
    _probe(uri)
    return uri


def open_tracking(store: Store, uri: str | None = None) -> Tracking:
    """Connects to `uri`, MLFLOW_TRACKING_URI or, for a local store, a SQLite file in it; creates the experiment.

    The driver must call it before any worker logs, because processes that open a new SQLite file at the same time
    break each other's migrations. Artifacts are stored in the store, except for a server with a local store, which the
    server cannot read: then the server stores them. Raises TrackingError within 15 s.
    """
    uri = check_tracking(store, uri)
    on_server = urlsplit(uri).scheme not in ONE_HOST_SCHEMES
    # A server may serve several stores, and runs with the same name in two of them must stay apart.
    name = EXPERIMENT if not on_server else f"{EXPERIMENT} {_host(store)}{store.uri}"
    artifacts = None if on_server and store.is_local else f"{_as_uri(store)}/mlflow-artifacts"
    with contextlib.nullcontext() if on_server else _alone(store), tracking_errors(uri, "cannot open the experiment"):
        return Tracking(uri, _experiment(mlflow_client(os.getpid(), uri), name, artifacts))


def _probe(uri: str) -> None:
    """Raises TrackingError if the server does not answer within 5 s; importing MLflow would take longer."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    parts = urlsplit(public_address(uri))
    try:
        urllib.request.urlopen(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/health")), timeout=5).close()
    except urllib.error.HTTPError:
        return  # the server answers; the first call shows whether it is MLflow and grants access
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
            f"experiment {name!r} was deleted: restore it with `mlflow experiments restore -x "
            f"{found.experiment_id}`, or remove it permanently with `mlflow gc`"
        )
    return found.experiment_id


def _sqlite_uri(store: Store) -> str:
    path = store.path("mlflow.db")
    if path is None:
        raise TrackingError(
            f"the store {store.uri} is shared, so runs cannot be kept in a file: start `mlflow server` and set "
            "MLFLOW_TRACKING_URI to its address"
        )
    return f"sqlite:///{path}"


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """One process at a time on this host, because two that migrate a new SQLite file at the same time break it."""
    path = store.path(".mlflow.lock")
    assert path is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise TrackingError(
            f"MLflow's file cannot be written to {store.uri} ({error.strerror}): use another store"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _host(store: Store) -> str:
    """Prefix that distinguishes local stores with the same path on different machines."""
    return f"{socket.gethostname()}:" if store.is_local else ""


def _as_uri(store: Store) -> str:
    return Path(store.uri).as_uri() if store.is_local else store.uri
