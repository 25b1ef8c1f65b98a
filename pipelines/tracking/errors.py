"""What MLflow raises, as errors that say which address, what is wrong and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

from data_shards.store.disk import full_disk, is_full, says_full
from pipelines.faults import RESUME

LOST = ("Max retries exceeded", "timed out", "Connection refused", "RemoteDisconnected")  # said of a server gone
# Said of one that is there, or of a SQLite file, and cannot do it at this moment.
BUSY = ("database is locked", "TEMPORARILY_UNAVAILABLE", "failed with error code 5", "Connection reset", "deadlock")


class TrackingError(ValueError):
    """MLflow cannot do what was asked: says which address, what is wrong and what to do."""


class AwayError(TrackingError):
    """MLflow does not answer, or cannot do it at this moment: another attempt may succeed."""


class PatienceError(TrackingError):
    """MLflow was away for longer than it is waited for."""


def public_address(uri: str) -> str:
    """`uri` without user and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


@contextlib.contextmanager
def tracking_errors(uri: str, doing: str) -> Iterator[None]:
    """Turns what MLflow at `uri` raises inside the block, while `doing` something, into a TrackingError."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, requests.RequestException, SQLAlchemyError) as error:
        told = " ".join(str(error).split()).replace(uri, public_address(uri))
        if urlsplit(uri).scheme == "sqlite" and (says_full(error) or is_full(_sqlite_path(uri))):
            raise TrackingError(
                f"{full_disk(_sqlite_path(uri), 'the runs that MLflow keeps')}, then {RESUME}"
            ) from error
        if any(sign in told for sign in LOST):
            raise AwayError(unreachable(uri, told.rpartition("Caused by ")[2][:200])) from error
        kind = AwayError if any(sign in told for sign in BUSY) else TrackingError
        raise kind(f"MLflow at {public_address(uri)}: {doing}: {told[:400]}{_remedy(uri, told)}") from error


def _sqlite_path(uri: str) -> str:
    """`sqlite:///relative.db` or `sqlite:////absolute.db` -> the file's path."""
    return urlsplit(uri).path[1:]


def unreachable(uri: str, reason: str) -> str:
    """The message about an MLflow that does not answer."""
    return (
        f"MLflow at {public_address(uri)} cannot be reached ({reason}): start it, or set MLFLOW_TRACKING_URI to where "
        "it listens"
    )


def _remedy(uri: str, told: str) -> str:
    """What to do, from what MLflow says: it tells kinds of failure apart only in its text."""
    if any(sign in told for sign in ("401", "403", "not authenticated")):
        return ": set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account that may do this"
    if "failed with error code 404" in told:
        return ": MLFLOW_TRACKING_URI names a server that is not MLflow"
    if urlsplit(uri).scheme == "sqlite" and ("sqlite3" in told or "OperationalError" in told):
        return ": the file must be a writable SQLite database of this version of MLflow or an older one"
    return ""
