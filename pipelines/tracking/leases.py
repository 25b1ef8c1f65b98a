"""Who may work on a run and on a registered model: one process at a time, in the one store they belong to."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from data_shards.store import Store
from data_shards.store.fenced_lease import FencedLease, fenced_lease
from pipelines.flow import Show
from pipelines.tracking.errors import TrackingError
from pipelines.tracking.runs import Tracking

RUN_WAIT_S = 120.0  # longer than a driver that died elsewhere keeps its lease
MODEL_WAIT_S = 600.0  # twenty that register large models one after the other
STORE_FILE = "store.json"
STORE_TAG, STORE_ID_TAG = "medmamba.store", "medmamba.store_id"


class Driver(Protocol):
    """What is needed of whoever works on a run."""

    @property
    def store(self) -> Store:
        """Where the run is."""

    @property
    def tracking(self) -> Tracking:
        """The MLflow of its store."""

    @property
    def show(self) -> Show:
        """Who is told."""


class OtherStoreError(ValueError):
    """A registered model belongs to another store: says which, why that matters and what to do."""


@contextlib.contextmanager
def driver_lease(store: Store, run: str, *, wait_s: float, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Holds the run: no other driver works on it while the block lasts (see `fenced_lease`).

    Yields what raises LostLeaseError once another driver has taken over, because this one was paused or cut off from
    the store. The block is interrupted then, as by Ctrl-C, and this raises LostLeaseError.
    """
    with fenced_lease(
        store,
        run_lease_key(run),
        what=f"run {run!r}",
        remedy="wait until it has finished (--wait-s SECONDS waits longer) or end that process, then run the same "
        "command again; `medmamba status` shows how far it is; another run needs another name (--run NAME)",
        wait_s=wait_s,
        say=say,
        on_lost=_interrupt_main,
    ) as held:
        try:
            yield held.check
        except (KeyboardInterrupt, SystemExit):  # Ray Train takes a Ctrl-C for the end of the process
            if held.is_lost:
                held.check()
            raise


def run_lease_key(run: str) -> str:
    """Where the lease of a run is in the store."""
    return f"leases/runs/{run}"


def _interrupt_main() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


@contextlib.contextmanager
def model_lease(context: Driver, model: str) -> Iterator[FencedLease]:
    """Holds the registered model `model`: no other process registers or promotes a version of it meanwhile.

    What a holder that died had left RUNNING in MLflow is ended.
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
    """Where the lease of a registered model is in the store."""
    return f"leases/models/{model}"


def bind_model(tracking: Tracking, model: str, store: Store, *, create: bool = False) -> int | None:
    """When the registered model was created (ms since 1970), which tells it from a later one of its name.

    It is bound to `store` by a tag, because two stores on one MLflow share no lease. A new model gets the tag as it is
    created; one of an earlier release gets it here. None where there is no such model and `create` is False.

    Raises:
        OtherStoreError: the model belongs to another store.
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
            return found.creation_timestamp
        else:
            theirs = found.tags.get(STORE_TAG, "another one")
            raise OtherStoreError(
                f"registered model {model!r} in MLflow at {tracking.address} belongs to the store {theirs}, and "
                f"this is {store.uri}: two stores share no lease, so promotions at the same time would overwrite each "
                f"other; use that store, or another model (--registry.model NAME). If that store is not used any more, "
                f"delete the tags {STORE_TAG} and {STORE_ID_TAG} of the model in MLflow"
            )
    raise TrackingError(f"MLflow at {tracking.address} does not keep the tags of {model!r}: run again")


def _store_id(store: Store) -> str:
    """What a store is recognised by, under whatever address it is reached; a copied folder has its original's."""
    content = {"id": secrets.token_hex(16)}
    store.put(STORE_FILE, json.dumps(content).encode() + b"\n", if_absent=True)
    try:
        return str(json.loads(store.get(STORE_FILE))["id"])
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{store.uri}/{STORE_FILE} is damaged ({error}): restore it, or delete it, and the tags {STORE_TAG} and "
            f"{STORE_ID_TAG} of the registered models of this store in MLflow"
        ) from None


def _registered(tracking: Tracking, model: str):
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
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another store at this moment: looked at next
                raise
