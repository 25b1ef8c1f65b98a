"""What Ray Tune is handed: a search, ASHA and a callback that keep nothing but the sweep's ledger.

Tune saves its searcher and its callbacks as pickles, into a folder that nobody reads; of these it gets nothing.
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
    """Tune copies what it is handed, and pickles it."""

    def __deepcopy__(self, memo: dict) -> Any:
        return self

    def __reduce__(self) -> tuple:
        return object, ()


class Search(_Unkept, Searcher):
    """Gives Tune the trials that are to do, and tells the ledger which have ended by themselves."""

    def __init__(self, ledger: Ledger, numbers: Sequence[int], choose: Callable[[int], dict[str, Any]]) -> None:
        """`numbers` of the trials, in their order; `choose` returns the overrides of a new one."""
        super().__init__(metric=METRIC, mode="max")
        self.ledger, self._numbers, self._choose = ledger, list(numbers), choose
        self._number_of: dict[str, int] = {}  # by Tune's id, which is another one after an interruption

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
        if not error:  # of an error the callback learns more
            self.ledger.end(self._number_of[trial_id], "ended")

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Saves nothing."""


class Asha(ASHAScheduler):
    """Ray's ASHA, with rungs that survive an interruption: its trials are known by their numbers."""

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
        """Reports again what earlier drivers have seen, in the order in which they saw it."""
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
    """Writes what Tune sees to the ledger, and begins the trials' runs in MLflow, which the driver has imported."""

    def __init__(self, ledger: Ledger, tracking: Tracking, parent: str, *, trials: int, epochs: int) -> None:
        self.ledger, self._tracking, self._parent = ledger, tracking, parent
        self._trials, self._epochs = trials, epochs
        self.errors: dict[int, BaseException] = {}
        """By number, why trials failed in this process."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        config, name = trial.config, trial_name(trial.config["number"], self._trials)
        with contextlib.suppress(TrackingError):  # then the trial makes it, which waits for MLflow
            self._tracking.impatient.trial_run(self._parent, config["id"], config["overrides"], name=name)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict, **info: Any) -> None:
        state: State = "running"
        if result.get("done"):  # ASHA has decided: it ends trials at their last epoch too
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
    """Runs so many trials of `search`, `at_once` at the same time; what they come to is in the ledger.

    Tune's own files go to a folder of this machine that is removed afterwards. Trials hand Tune no checkpoint, so those
    on other machines need not see it. Raises what the ledger could not be written for.
    """
    with scratch("tune") as folder, contextlib.redirect_stdout(io.StringIO()):  # Tune draws tables; ours is for results
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
        except tune.TuneError:  # of what is raised in a callback it holds the text alone
            if keeper.ledger.broken is not None:
                raise keeper.ledger.broken from None
            raise


def _numbered(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["number"])


def _error_of(trial: Any) -> BaseException:
    """What ended a trial. Tune has written it to a file of its session on this machine a moment ago."""
    path = trial.pickled_error_file
    if path is None:
        return RuntimeError(Path(trial.error_file).read_text() if trial.error_file else "no reason is known")
    return cloudpickle.loads(Path(path).read_bytes())
