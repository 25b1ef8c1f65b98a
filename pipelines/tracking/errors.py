"""Converts MLflow's exceptions into errors that give the address, the reason and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

from data_shards.store.disk import full_disk, is_full, says_full
from pipelines.faults import RESUME

LOST = ("Max retries exceeded", "timed out", "Connection refused", "RemoteDisconnected")  # the server is unreachable
# The server or SQLite file is reachable but temporarily unable to serve the request.
BUSY = ("database is locked", "TEMPORARILY_UNAVAILABLE", "failed with error code 5", "Connection reset", "deadlock")


class TrackingError(ValueError):
    """A call of MLflow failed. The message gives the address, the reason and the remedy."""


class AwayError(TrackingError):
    """MLflow does not answer or is temporarily unable to serve the request; a retry may succeed."""


class PatienceError(TrackingError):
    """MLflow was unavailable for longer than `patience_s`."""


def public_address(uri: str) -> str:
    """`uri` without user and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


@contextlib.contextmanager
def tracking_errors(uri: str, doing: str) -> Iterator[None]:
    """Converts exceptions of MLflow at `uri` inside the block into TrackingError; `doing` begins the message."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, requests.RequestException, SQLAlchemyError) as error:
        text = " ".join(str(error).split()).replace(uri, public_address(uri))
        if urlsplit(uri).scheme == "sqlite" and (says_full(error) or is_full(_sqlite_path(uri))):
            raise TrackingError(
                f"{full_disk(_sqlite_path(uri), 'the runs that MLflow keeps')}, then {RESUME}"
            ) from error
        if any(sign in text for sign in LOST):
            raise AwayError(unreachable(uri, text.rpartition("Caused by ")[2][:200])) from error
        kind = AwayError if any(sign in text for sign in BUSY) else TrackingError
        raise kind(f"MLflow at {public_address(uri)}: {doing}: {text[:400]}{_remedy(uri, text)}") from error


def _sqlite_path(uri: str) -> str:
    """`sqlite:///relative.db` or `sqlite:////absolute.db` -> the file's path."""
    return urlsplit(uri).path[1:]


def unreachable(uri: str, reason: str) -> str:
    """The message about an MLflow that does not answer."""
    return (
        f"MLflow at {public_address(uri)} cannot be reached ({reason}): start it, or set MLFLOW_TRACKING_URI to its "
        "address"
    )


def _remedy(uri: str, text: str) -> str:
    """The remedy for an error of MLflow, whose kinds can only be told apart by their text."""
    if any(sign in text for sign in ("401", "403", "not authenticated")):
        return ": set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account that may do this"
    if "failed with error code 404" in text:
        return ": MLFLOW_TRACKING_URI points to a server that is not MLflow"
    if urlsplit(uri).scheme == "sqlite" and ("sqlite3" in text or "OperationalError" in text):
        return ": the file must be a writable SQLite database of this version of MLflow or an older one"
    return ""
