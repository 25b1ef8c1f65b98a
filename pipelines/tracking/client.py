"""Runs in MLflow: every call that records what a step or a trial did (registry.py has the models).

The driver opens a `Tracking`, makes the runs and keeps their ids in the steps' folders before the work begins;
workers receive the picklable `Tracking` and log by run id. Nothing here touches MLflow's process-wide "active run".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import logging
import math
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from data_shards.store import Store, StoreKeyError
from data_shards.store.disk import full_disk, is_full, says_full
from data_shards.store.fenced_lease import is_lost
from data_shards.store.outage import Outage, outage_of, span
from pipelines.faults import RESUME, kept_reason
from pipelines.flow.record import CONFIG
from pipelines.interrupt import is_interrupted
from pipelines.provenance import git_commit

RUN_FILE = "mlflow.json"
EXPERIMENT = "medmamba"
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
LOST = ("Max retries exceeded", "timed out", "Connection refused", "RemoteDisconnected")  # said of a server gone
# Said of one that is there, or of a SQLite file, and cannot do it at this moment.
BUSY = ("database is locked", "TEMPORARILY_UNAVAILABLE", "failed with error code 5", "Connection reset", "deadlock")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # between two attempts
REASON = "medmamba.failure"  # tag of a run that failed: why
TAG_CHARACTERS = 500
PARAM_CHARACTERS = 6000  # the most that MLflow keeps of one parameter
IN_FLIGHT_S = 8.0  # a request that its sender did not live to see answered is carried out within this time,
RECENT_S = 60.0  # if what it belongs to was begun less than this ago
BATCH_METRICS = 1000  # points in one call, MLflow's limit
BATCH_ENTRIES = 100  # parameters or tags in one call
Made = TypeVar("Made")
# Addresses at which this process has begun a run: from then on a server that is away is waited for.
_reached: set[str] = set()


class TrackingError(ValueError):
    """MLflow cannot do what was asked: says which address, what is wrong and what to do."""


class AwayError(TrackingError):
    """MLflow does not answer, or cannot do it at this moment: another attempt may succeed."""


class PatienceError(TrackingError):
    """MLflow was away for longer than it is waited for."""


@dataclass(frozen=True)
class Tracking:
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
        return _client(os.getpid(), self.uri)

    @property
    def is_one_host(self) -> bool:
        """True where runs live in a file: workers on other machines could not reach it."""
        return urlsplit(self.uri).scheme in ONE_HOST_SCHEMES

    @property
    def address(self) -> str:
        """The uri without a password, for records and people."""
        return public_address(self.uri)

    @property
    def impatient(self) -> Tracking:
        """The same, without waiting for an MLflow that is away."""
        return replace(self, patience_s=0.0)

    def errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Turns what MLflow raises inside the block into a TrackingError."""
        return _errors(self.uri, doing)

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

    def step_run(
        self,
        out: Store,
        *,
        run: str,
        step: str,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> str:
        """The run id of a step, in state RUNNING: the same id again when the step is resumed.

        The id is kept in `out`/mlflow.json before any work; where the driver died before writing it, the run is
        found by its tags: the folder, and the configuration in it (a folder that was deleted may come back with
        another). Raises TrackingError where the kept id is not known at this address.
        """
        kept = self._kept_run(out)
        same = {"medmamba.record": out.uri, "medmamba.identity": _identity(out)}
        identity = {"medmamba.run": run, "medmamba.step": step, **same}
        origin = {"mlflow.source.git.commit": git_commit(), "mlflow.source.name": f"medmamba {step}"}
        about = {**identity, **origin, **_parent(parent), **(tags or {})}

        def begin(found: str | None) -> str:
            return self._begin(found, f"{run}/{step}", about)

        def resume() -> str | None:
            found = self._find(same)
            return begin(found) if found else None

        run_id = begin(kept) if kept else make_once(out, "mlflow-run.asked", find=resume, make=lambda: begin(None))
        if kept is None:
            content = {"run_id": run_id, "experiment_id": self.experiment_id, "tracking_uri": self.address}
            out.put(RUN_FILE, json.dumps(content, indent=2).encode() + b"\n")
        self.log_params(run_id, params or {})
        return run_id

    def trial_run(
        self, parent_id: str, trial_id: str, params: Mapping[str, Any] | None = None, *, name: str = ""
    ) -> str:
        """The run id of a trial, nested under the sweep's run; found again by its tags after a restore.

        `name` is what users read, by default made from the id.
        """
        identity = {**_parent(parent_id), "medmamba.trial": trial_id}
        # Looked for before each attempt: one of which the answer was lost may have made it.
        run_id = self.patiently(lambda: self._begin(self._find(identity), name or f"trial {trial_id}", identity))
        self.log_params(run_id, params or {})
        return run_id

    @contextlib.contextmanager
    def running(
        self, out: Store, *, run: str, step: str, check: Callable[[], None] = lambda: None, **details: Any
    ) -> Iterator[str]:
        """`step_run` for the length of a block: FINISHED after it, FAILED or KILLED where it raises.

        `check` raises LostLeaseError where another driver has taken the run over: its state is that driver's then.
        """
        begin = functools.partial(self.step_run, out, run=run, step=step, **details)
        run_id = self.patiently(begin) if self.uri in _reached else begin()
        _reached.add(self.uri)
        try:
            yield run_id
        except BaseException as error:
            if is_lost(check):
                raise
            # What broke the step is what must be told, and at once, not that MLflow could not be told of it.
            quick = self.impatient
            with contextlib.suppress(TrackingError):
                has_failed = isinstance(error, Exception) and not is_interrupted()
                if has_failed:
                    places = [out.uri] if out.is_local else []
                    reason = kept_reason(error, step=step, places=places)
                    quick.set_tags(run_id, {REASON: reason[:TAG_CHARACTERS]})
                quick.finish(run_id, "FAILED" if has_failed else "KILLED")
            raise
        self.finish(run_id)

    def log_metrics(
        self, run_id: str, metrics: Mapping[str, float], *, step: int = 0, at_ms: int | None = None
    ) -> None:
        """Adds one point to each metric's curve; one call, whatever their number.

        A point that is sent again with the same `at_ms` (milliseconds since 1970; default: now) is one point.
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
        """One epoch of a training: the loss of each of its optimiser steps over steps, then `metrics` over epochs.

        `metrics` holds "epoch" (1 for the first) and "step" (optimiser steps made so far). Losses up to `after_step`
        are left out, and those that are not finite: such a step was skipped. For `at_ms` see `log_metrics`.
        """
        at_ms, first = at_ms or _now_ms(), int(metrics["step"]) - len(step_losses) + 1
        losses = [("step_loss", float(loss), step) for step, loss in enumerate(step_losses, first)]
        points = [point for point in losses if point[2] > after_step and math.isfinite(point[1])]
        for begin in range(0, len(points), BATCH_METRICS):
            self._log_points(run_id, points[begin : begin + BATCH_METRICS], at_ms)
        values = {name: value for name, value in metrics.items() if name not in ("epoch", "step")}
        self.log_metrics(run_id, values, step=int(metrics["epoch"]), at_ms=at_ms)

    def read_steps(self, run_id: str, name: str) -> list[int]:
        """The steps at which the run has points of a metric."""

        def read() -> list[int]:
            with self.errors("cannot read metrics"):
                return [point.step for point in self.client.get_metric_history(run_id, name)]

        return self.patiently(read)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs nested mappings as dotted keys. Saying the same again is no error, saying another value is."""
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

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        assert status in ("FINISHED", "FAILED", "KILLED"), status

        def end() -> None:
            with self.errors("cannot end the run"):
                self.client.set_terminated(run_id, status)

        self.patiently(end)

    def _log_points(self, run_id: str, points: Sequence[tuple[str, float, int]], at_ms: int) -> None:
        """Points (name, value, step) of one moment, in one call."""

        def log() -> None:
            from mlflow.entities import Metric

            with self.errors("cannot log metrics"):
                entries = [Metric(name, value, at_ms, step) for name, value, step in points]
                self.client.log_batch(run_id, metrics=entries)

        if points:
            self.patiently(log)

    def close_run(self, run_id: str) -> None:
        """Ends a run as KILLED if it is still RUNNING; one that MLflow does not know is no error."""
        from mlflow.exceptions import MlflowException

        with self.errors("cannot end a run"):
            try:
                if self.client.get_run(run_id).info.status == "RUNNING":
                    self.client.set_terminated(run_id, "KILLED")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def find_trial(self, parent_id: str, trial_id: str, params: Mapping[str, Any], *, name: str) -> str:
        """`trial_run` for the trial's own process, which may outlive its sweep for a moment: nothing of a sweep that
        has ended is RUNNING again."""
        found = self._find({**_parent(parent_id), "medmamba.trial": trial_id})
        if found:
            return found
        run_id = self.trial_run(parent_id, trial_id, params, name=name)
        with self.errors("cannot read the sweep's state"):
            status = self.client.get_run(parent_id).info.status
        if status != "RUNNING":
            self.finish(run_id, "KILLED")
        return run_id

    def reopen_trials(self, parent_id: str) -> None:
        """Says RUNNING of the trials that an interruption ended, before the sweep resumes them."""

        def reopen() -> None:
            with self.errors("cannot begin the trials again"):
                where = f"{_where(_parent(parent_id))} and attributes.status = 'KILLED'"
                for each in self.client.search_runs([self.experiment_id], where, max_results=1000):
                    self.client.update_run(each.info.run_id, status="RUNNING")

        self.patiently(reopen)

    def close_trials(self, parent_id: str, status: str = "KILLED") -> int:
        """Ends the trials of a sweep that are still RUNNING (their process died); returns how many."""
        with self.errors("cannot end the trials"):
            where = f"{_where(_parent(parent_id))} and attributes.status = 'RUNNING'"
            trials = self.client.search_runs([self.experiment_id], where, max_results=1000)
        for trial in trials:
            self.finish(trial.info.run_id, status)
        return len(trials)

    def close_killed(self, run: Store) -> int:
        """Ends as KILLED what a killed driver left RUNNING of the run in this folder; returns how many.

        Nobody else may be working on the run.
        """
        with self.errors("cannot end the runs of a killed command"):
            where = "attributes.status = 'RUNNING'"
            left = self.client.search_runs([self.experiment_id], where, max_results=1000)
            mine = {each.info.run_id for each in left if _is_below(each.data.tags.get("medmamba.record", ""), run)}
            mine |= {each.info.run_id for each in left if each.data.tags.get("mlflow.parentRunId") in mine}
        for run_id in mine:
            self.finish(run_id, "KILLED")
        return len(mine)

    def drop_trials(self, parent_id: str, kept: Collection[str]) -> None:
        """Deletes the trials of a sweep that are not in `kept`: a killed driver forgot them, others replaced them."""

        def drop() -> None:
            with self.errors("cannot remove trials"):
                for trial in self.client.search_runs(
                    [self.experiment_id], _where(_parent(parent_id)), max_results=1000
                ):
                    if trial.data.tags.get("medmamba.trial") not in kept:
                        self.client.delete_run(trial.info.run_id)

        self.patiently(drop)

    def _begin(self, found: str | None, name: str, tags: Mapping[str, str]) -> str:
        with self.errors("cannot begin a run"):
            if found is None:
                return self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags)).info.run_id
            self.client.update_run(found, status="RUNNING")
            if REASON in self.client.get_run(found).data.tags:
                self.client.delete_tag(found, REASON)  # of an earlier try
            return found

    def _find(self, tags: Mapping[str, str]) -> str | None:
        with self.errors("cannot search runs"):
            order = ["attributes.start_time ASC"]
            runs = self.client.search_runs([self.experiment_id], _where(tags), max_results=1, order_by=order)
        return runs[0].info.run_id if runs else None

    def _kept_run(self, out: Store) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            kept = json.loads(out.get(RUN_FILE))
            known = isinstance(kept, dict) and all(isinstance(kept.get(n), str) for n in ("run_id", "tracking_uri"))
        except StoreKeyError:
            return None
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise TrackingError(
                f"{out.uri}/{RUN_FILE} is not what a step writes: it was edited or damaged; delete that file to find "
                "the run again by its tags"
            )
        with self.errors("cannot read a run"):
            try:
                found = self.client.get_run(kept["run_id"])
                if found.data.tags.get("medmamba.identity", "") not in ("", _identity(out)):
                    return None  # of a configuration that was refused; the step has another one now
                if found.info.lifecycle_stage == "active":
                    return kept["run_id"]
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        raise TrackingError(
            f"{out.uri}/{RUN_FILE} names run {kept['run_id']} of {kept['tracking_uri']}, which {self.address} does not "
            "have: set MLFLOW_TRACKING_URI to the former, or delete that file to begin a new run"
        )


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
    with contextlib.nullcontext() if on_server else _alone(store), _errors(uri, "cannot open the experiment"):
        return Tracking(uri, _experiment(_client(os.getpid(), uri), name, artifacts))


def make_once(out: Store, asked: str, *, find: Callable[[], Made | None], make: Callable[[], Made]) -> Made:
    """What `find` finds, else what `make` makes: once, also where an earlier process was killed while it asked for it.

    MLflow may carry out a request after its sender has died. So the object `asked` in `out` marks that it is under way,
    and whoever finds such a mark gives it IN_FLIGHT_S to appear. One process at a time may call this for an `out`.
    """
    found = find()
    if found is None and not out.put(asked, b"", if_absent=True):
        until = time.monotonic() + (IN_FLIGHT_S if out.age_s(asked) < RECENT_S else 0.0)
        while found is None and time.monotonic() < until:
            time.sleep(0.5)
            found = find()
        out.put(asked, b"")
    made = make() if found is None else found
    out.delete(asked)
    return made


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def public_address(uri: str) -> str:
    """`uri` without user and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


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
        raise TrackingError(_unreachable(uri, str(reason))) from error


@functools.lru_cache(maxsize=8)
def _client(pid: int, uri: str) -> Any:
    # MLflow reads the settings from the environment at each request; its migrations log at INFO.
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.db_migrations"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


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
            f"{store.uri} is no folder that MLflow's file can be written to ({error.strerror}): use another store"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _host(store: Store) -> str:
    """The same folder name on two machines is two stores."""
    return f"{socket.gethostname()}:" if store.is_local else ""


def _as_uri(store: Store) -> str:
    return Path(store.uri).as_uri() if store.is_local else store.uri


def _identity(out: Store) -> str:
    """Digest of the configuration that the step in `out` was begun with; empty where none is written."""
    try:
        return hashlib.sha256(out.get(CONFIG)).hexdigest()
    except StoreKeyError:
        return ""


def _now_ms() -> int:
    return int(time.time() * 1000)


def _is_below(uri: str, folder: Store) -> bool:
    return uri.startswith(f"{folder.uri}/")


def _parent(run_id: str | None) -> dict[str, str]:
    return {} if run_id is None else {"mlflow.parentRunId": run_id}


def _where(tags: Mapping[str, str]) -> str:
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())


@contextlib.contextmanager
def _errors(uri: str, doing: str) -> Iterator[None]:
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
            raise AwayError(_unreachable(uri, told.rpartition("Caused by ")[2][:200])) from error
        kind = AwayError if any(sign in told for sign in BUSY) else TrackingError
        raise kind(f"MLflow at {public_address(uri)}: {doing}: {told[:400]}{_remedy(uri, told)}") from error


def _sqlite_path(uri: str) -> str:
    """`sqlite:///relative.db` or `sqlite:////absolute.db` -> the file's path."""
    return urlsplit(uri).path[1:]


def _unreachable(uri: str, reason: str) -> str:
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
