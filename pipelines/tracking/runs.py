"""MLflow runs of steps and trials: each is created once, found again on resume, and never left RUNNING.

The driver creates the runs and stores their ids in the steps' folders before the work starts; workers receive the
picklable `Tracking` and log by run id. MLflow's process-wide "active run" is never used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_shards.store import Store, StoreKeyError
from data_shards.store.fenced_lease import is_lost
from pipelines.faults import kept_reason
from pipelines.flow.record import CONFIG
from pipelines.interrupt import is_interrupted
from pipelines.provenance import git_commit
from pipelines.tracking.client import Made
from pipelines.tracking.errors import TrackingError
from pipelines.tracking.log import RunLog

RUN_FILE = "mlflow.json"
REASON = "medmamba.failure"  # tag with the reason why a run failed
TAG_CHARACTERS = 500
IN_FLIGHT_S = 8.0  # MLflow executes the request of a dead sender within this time
RECENT_S = 60.0  # and only requests younger than this may still be in progress
# Addresses where this process has started a run; from then on it waits for an unavailable server.
_reached: set[str] = set()


@dataclass(frozen=True)
class Tracking(RunLog):
    """Starts, finds and ends the runs of steps and trials, and logs to them."""

    @property
    def impatient(self) -> Tracking:
        """A copy that does not wait for an unavailable MLflow."""
        return replace(self, patience_s=0.0)

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
        """Starts or resumes the run of a step; returns its id, which is the same when the step is resumed.

        The id is stored in `out`/mlflow.json before any work. If the driver died before writing it, the run is found by
        its tags: the folder and its configuration (a deleted folder may be recreated with another one). Raises
        TrackingError if the stored id does not exist at this address.
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
        """The run id of a trial, nested under the sweep's run; an existing run is found by its tags.

        `name` is shown to users; by default it is made from the id.
        """
        identity = {**_parent(parent_id), "medmamba.trial": trial_id}
        # Search before each attempt, because an attempt whose answer was lost may have created the run.
        run_id = self.patiently(lambda: self._begin(self._find(identity), name or f"trial {trial_id}", identity))
        self.log_params(run_id, params or {})
        return run_id

    @contextlib.contextmanager
    def running(
        self, out: Store, *, run: str, step: str, check: Callable[[], None] = lambda: None, **details: Any
    ) -> Iterator[str]:
        """Runs `step_run` around a block: the run becomes FINISHED after it, or FAILED or KILLED if it raises.

        `check` raises LostLeaseError if another driver has taken over the run; its state is then left to that driver.
        """
        begin = functools.partial(self.step_run, out, run=run, step=step, **details)
        run_id = self.patiently(begin) if self.uri in _reached else begin()
        _reached.add(self.uri)
        try:
            yield run_id
        except BaseException as error:  # broad: every way to end must close the run; it is raised again
            if is_lost(check):
                raise
            # Errors of MLflow must neither hide nor delay the step's own error.
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

    def close_run(self, run_id: str) -> None:
        """Ends a run as KILLED if it is still RUNNING; does nothing if MLflow does not know it."""
        from mlflow.exceptions import MlflowException

        with self.errors("cannot end a run"):
            try:
                if self.client.get_run(run_id).info.status == "RUNNING":
                    self.client.set_terminated(run_id, "KILLED")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def find_trial(self, parent_id: str, trial_id: str, params: Mapping[str, Any], *, name: str) -> str:
        """`trial_run` for the trial's own process, which may outlive its sweep.

        If the sweep has already ended, the trial's run is not left RUNNING.
        """
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
        """Sets the trials that an interruption ended back to RUNNING, before the sweep resumes them."""

        def reopen() -> None:
            with self.errors("cannot restart the trials"):
                where = f"{_where(_parent(parent_id))} and attributes.status = 'KILLED'"
                for each in self.client.search_runs([self.experiment_id], where, max_results=1000):
                    self.client.update_run(each.info.run_id, status="RUNNING")

        self.patiently(reopen)

    def close_trials(self, parent_id: str, status: str = "KILLED") -> int:
        """Ends the trials of a sweep that are still RUNNING because their process died; returns how many."""
        with self.errors("cannot end the trials"):
            where = f"{_where(_parent(parent_id))} and attributes.status = 'RUNNING'"
            trials = self.client.search_runs([self.experiment_id], where, max_results=1000)
        for trial in trials:
            self.finish(trial.info.run_id, status)
        return len(trials)

    def close_killed(self, run: Store) -> int:
        """Ends as KILLED the runs in this folder that a killed driver left RUNNING; returns how many.

        The caller must hold the run's lease.
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
        """Deletes the trials of a sweep that are not in `kept`: a killed driver lost them and others replaced them."""

        def drop() -> None:
            with self.errors("cannot remove trials"):
                for trial in self.client.search_runs(
                    [self.experiment_id], _where(_parent(parent_id)), max_results=1000
                ):
                    if trial.data.tags.get("medmamba.trial") not in kept:
                        self.client.delete_run(trial.info.run_id)

        self.patiently(drop)

    def _begin(self, found: str | None, name: str, tags: Mapping[str, str]) -> str:
        with self.errors("cannot start a run"):
            if found is None:
                created = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags))
                return str(created.info.run_id)
            self.client.update_run(found, status="RUNNING")
            if REASON in self.client.get_run(found).data.tags:
                self.client.delete_tag(found, REASON)  # from an earlier attempt
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
                f"{out.uri}/{RUN_FILE} was edited or damaged; delete that file to find the run by its tags"
            )
        with self.errors("cannot read a run"):
            try:
                found = self.client.get_run(kept["run_id"])
                if found.data.tags.get("medmamba.identity", "") not in ("", _identity(out)):
                    return None  # it belongs to a rejected configuration of this step
                if found.info.lifecycle_stage == "active":
                    return str(kept["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        raise TrackingError(
            f"{out.uri}/{RUN_FILE} names run {kept['run_id']} of {kept['tracking_uri']}, which {self.address} does not "
            "have: set MLFLOW_TRACKING_URI to the former, or delete that file to start a new run"
        )


def make_once(out: Store, asked: str, *, find: Callable[[], Made | None], make: Callable[[], Made]) -> Made:
    """Returns the result of `find`, or of `make` if that is None; makes it only once even across kills.

    MLflow may execute a request after its sender has died. The object `asked` in `out` therefore marks a request in
    progress, and a process that finds the mark waits IN_FLIGHT_S for the result to appear. Only one process at a time
    may call this for an `out`.
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


def _identity(out: Store) -> str:
    """Digest of the configuration that the step in `out` was started with; empty if none is written."""
    try:
        return hashlib.sha256(out.get(CONFIG)).hexdigest()
    except StoreKeyError:
        return ""


def _is_below(uri: str, folder: Store) -> bool:
    return uri.startswith(f"{folder.uri}/")


def _parent(run_id: str | None) -> dict[str, str]:
    return {} if run_id is None else {"mlflow.parentRunId": run_id}


def _where(tags: Mapping[str, str]) -> str:
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
