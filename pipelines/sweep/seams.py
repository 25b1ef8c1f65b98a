"""Adapters for Ray Tune: a searcher, ASHA and a callback whose only persistent state is the sweep's ledger.

Tune pickles its searcher and its callbacks; these pickle to nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from pipelines.faults import innermost, kept_reason
from pipelines.scratch import scratch
from pipelines.sweep.ledger import Ledger, State, trial_name
from pipelines.tracking import Tracking, TrackingError
from pipelines.worker.engine.step_guard import TrainingError

METRIC, EPOCH, REPORTED = "val_auc", "epoch", "reported"


class _Unkept:
    """Survives Tune's deep copies as the same object, and pickles to an empty one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return object, ()


class Search(_Unkept, Searcher):
    """Gives Tune the trials to run, and records in the ledger which have ended on their own."""

    def __init__(self, ledger: Ledger, numbers: Sequence[int], choose: Callable[[int], dict[str, Any]]) -> None:
        """`numbers` are the trials to run, in order; `choose` returns the overrides of a new trial."""
        super().__init__(metric=METRIC, mode="max")
        self.ledger, self._numbers, self._choose = ledger, list(numbers), choose
        self._number_of: dict[str, int] = {}  # by Tune's id, which changes when the sweep resumes

    def suggest(self, trial_id: str) -> Any:
        if not self._numbers:
            return Searcher.FINISHED
        number = self._numbers.pop(0)
        record = self.ledger.begin(number, lambda: self._choose(number))
        self._number_of[trial_id] = number
        return {
            "number": number,
            "id": record.id,
            "recorded": len(record.epochs),
            "overrides": dict(record.overrides),
        }

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if not error:  # Keeper.on_trial_error records errors with their reason
            self.ledger.end(self._number_of[trial_id], "ended")

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """See Searcher. The ledger holds the state, so there is nothing to save."""


class Asha(ASHAScheduler):
    """Ray's ASHA with rungs that can be rebuilt after an interruption, because it identifies trials by number."""

    def __init__(self, epochs: int, grace_epochs: int, reduction_factor: int) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=METRIC,
            mode="max",
            max_t=epochs,
            grace_period=min(grace_epochs, epochs),
            reduction_factor=reduction_factor,
        )

    def refill(self, ledger: Ledger) -> None:
        """Rebuilds the rungs: reports the ledger's epochs again in their original order."""
        for record, epoch in ledger.events():
            seen = SimpleNamespace(config={"number": record.number})
            result = {**record.epochs[epoch - 1].metrics, EPOCH: epoch}
            if epoch == 1:
                self.on_trial_add(None, seen)
            self.on_trial_result(None, seen, result)
            if epoch == len(record.epochs) and record.state in ("ended", "stopped"):
                self.on_trial_complete(None, seen, result)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _numbered(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        return super().on_trial_result(tune_controller, _numbered(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        super().on_trial_complete(tune_controller, _numbered(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _numbered(trial))


class Keeper(_Unkept, tune.Callback):
    """Records Tune's events in the ledger, and creates the trials' MLflow runs, since the driver imports MLflow."""

    def __init__(self, ledger: Ledger, tracking: Tracking, parent: str, *, trials: int, epochs: int) -> None:
        self.ledger, self._tracking, self._parent = ledger, tracking, parent
        self._trials, self._epochs = trials, epochs
        self.errors: dict[int, BaseException] = {}
        """Errors of trials that failed in this process, by number."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        config, name = trial.config, trial_name(trial.config["number"], self._trials)
        with contextlib.suppress(TrackingError):  # the trial then creates the run itself and waits for MLflow
            self._tracking.impatient.trial_run(self._parent, config["id"], config["overrides"], name=name)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict, **info: Any) -> None:
        state: State = "running"
        if result.get("done"):  # ASHA sets it both when it stops a trial and at the last epoch
            state = "ended" if result[EPOCH] >= self._epochs else "stopped"
        self.ledger.add_epoch(trial.config["number"], result[REPORTED], state)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = _error_of(trial)
        self.errors[trial.config["number"]] = error
        state: State = "diverged" if isinstance(innermost(error), TrainingError) else "failed"
        self.ledger.end(trial.config["number"], state, kept_reason(error, step="tune"))


def run_trials(
    trainable: Any,
    search: Search,
    asha: Asha,
    keeper: Keeper,
    *,
    trials: int,
    at_once: int,
) -> None:
    """Runs `trials` trials of `search`, `at_once` at a time; the results are in the ledger.

    Tune's own files go to a temporary folder on this machine. Trials pass no checkpoints to Tune, so workers on other
    machines need no access to it. Raises the error of a failed ledger write.
    """
    with scratch("tune") as folder, contextlib.redirect_stdout(io.StringIO()):  # Tune prints tables to stdout
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=trials,
                max_concurrent_trials=at_once,
                reuse_actors=True,  # a process needs 6 s to import torch and DeepSpeed
                search_alg=search,
                scheduler=asha,
            ),
            run_config=tune.RunConfig(name="sweep", storage_path=str(folder), verbose=0, callbacks=[keeper]),
        )
        try:
            tuner.fit()
        except tune.TuneError:  # it keeps only the text of an exception raised in a callback
            if keeper.ledger.broken is not None:
                raise keeper.ledger.broken from None
            raise


def _numbered(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["number"])


def _error_of(trial: Any) -> BaseException:
    """The exception that ended a trial, from the file that Tune has just written on this machine."""
    path = trial.pickled_error_file
    if path is None:
        return RuntimeError(Path(trial.error_file).read_text() if trial.error_file else "the reason is unknown")
    error: BaseException = cloudpickle.loads(Path(path).read_bytes())
    return error
