"""Leases on runs and on registered models: one process at a time may change them."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from data_shards.store import Store
from data_shards.store.fenced_lease import FencedLease, fenced_lease
from pipelines.flow import Show
from pipelines.tracking.errors import TrackingError
from pipelines.tracking.runs import Tracking

RUN_WAIT_S = 120.0  # longer than the lease of a dead driver on another machine lasts
MODEL_WAIT_S = 600.0  # enough for twenty processes that register large models in turn
STORE_FILE = "store.json"
STORE_TAG, STORE_ID_TAG = "medmamba.store", "medmamba.store_id"


class Driver(Protocol):
    """The process that works on a run."""

    @property
    def store(self) -> Store:
        """The store with the run."""

    @property
    def tracking(self) -> Tracking:
        """The store's MLflow."""

    @property
    def show(self) -> Show:
        """Receives messages for the user."""


class OtherStoreError(ValueError):
    """A registered model belongs to another store. The message gives both stores and the remedy."""


@contextlib.contextmanager
def driver_lease(store: Store, run: str, *, wait_s: float, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Holds the lease of a run, so that no other driver works on it inside the block (see `fenced_lease`).

    Yields a function that raises LostLeaseError once another driver has taken over, because this one was paused or cut
    off from the store. In that case the block is also interrupted as by Ctrl-C, and LostLeaseError is raised.
    """
    with fenced_lease(
        store,
        run_lease_key(run),
        what=f"run {run!r}",
        remedy="wait until it has finished (--wait-s SECONDS waits longer) or end that process, then run the same "
        "command again; `medmamba status` shows its progress; use --run NAME for a separate run",
        wait_s=wait_s,
        say=say,
        on_lost=_interrupt_main,
    ) as held:
        try:
            yield held.check
        except (KeyboardInterrupt, SystemExit):  # Ray Train turns Ctrl-C into SystemExit
            if held.is_lost:
                held.check()
            raise


def run_lease_key(run: str) -> str:
    """The key of a run's lease in the store."""
    return f"leases/runs/{run}"


def _interrupt_main() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


@contextlib.contextmanager
def model_lease(context: Driver, model: str) -> Iterator[FencedLease]:
    """Holds the lease of a registered model, so that no other process registers or promotes a version in the block.

    Ends the MLflow run that a dead holder left RUNNING.
    """
    with fenced_lease(
        context.store,
        model_lease_key(model),
        what=f"registered model {model!r}",
        remedy="wait until it has finished, or end that process, then run the same command again",
        wait_s=MODEL_WAIT_S,
        say=context.show.say,
    ) as held:
        if held.before is not None and (run_id := held.before.about.get("mlflow_run")):
            context.tracking.close_run(run_id)
        yield held


def model_lease_key(model: str) -> str:
    """The key of a registered model's lease in the store."""
    return f"leases/models/{model}"


def bind_model(tracking: Tracking, model: str, store: Store, *, create: bool = False) -> int | None:
    """Binds a registered model to `store` with tags, because leases in different stores do not exclude each other.

    Returns the model's creation time (ms since 1970), which distinguishes it from a later model of the same name; None
    if the model does not exist and `create` is False.

    Raises:
        OtherStoreError: The model belongs to another store.
        TrackingError: MLflow does not keep the tags.
    """
    identity = _store_id(store)
    tags = {STORE_TAG: f"{socket.gethostname()}:{store.uri}" if store.is_local else store.uri, STORE_ID_TAG: identity}
    for _ in range(3):
        found = _registered(tracking, model)
        if found is None:
            if not create:
                return None
            _create(tracking, model, tags)
        elif STORE_ID_TAG not in found.tags:
            with tracking.errors(f"cannot tag {model}"):
                for key, value in tags.items():
                    tracking.client.set_registered_model_tag(model, key, value)
        elif found.tags[STORE_ID_TAG] == identity:
            return int(found.creation_timestamp)
        else:
            theirs = found.tags.get(STORE_TAG, "(unknown)")
            raise OtherStoreError(
                f"registered model {model!r} in MLflow at {tracking.address} belongs to the store {theirs}, but this "
                f"store is {store.uri}: leases do not work across stores, so simultaneous promotions would overwrite "
                f"each other; use that store, or another model (--registry.model NAME). If that store is no longer "
                f"used, delete the tags {STORE_TAG} and {STORE_ID_TAG} of the model in MLflow"
            )
    raise TrackingError(f"MLflow at {tracking.address} does not keep the tags of {model!r}: run the same command again")


def _store_id(store: Store) -> str:
    """The store's id, independent of the address it is reached by. A copied folder has the id of the original."""
    content = {"id": secrets.token_hex(16)}
    store.put(STORE_FILE, json.dumps(content).encode() + b"\n", if_absent=True)
    try:
        return str(json.loads(store.get(STORE_FILE))["id"])
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{store.uri}/{STORE_FILE} is damaged ({error}): restore it, or delete it together with the tags "
            f"{STORE_TAG} and {STORE_ID_TAG} of this store's registered models in MLflow"
        ) from None


def _registered(tracking: Tracking, model: str) -> Any:
    """The registered model, or None if there is none."""
    from mlflow.exceptions import MlflowException

    with tracking.errors(f"cannot read the registered model {model}"):
        try:
            return tracking.client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def _create(tracking: Tracking, model: str, tags: dict[str, str]) -> None:
    from mlflow.exceptions import MlflowException

    with tracking.errors(f"cannot create the registered model {model}"):
        try:
            tracking.client.create_registered_model(model, tags=tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another store was faster; the caller looks again
                raise
