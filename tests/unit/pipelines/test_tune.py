"""Which trial of a sweep wins, from what Ray Tune reports of each."""

import copy
import math
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.tune import Result

from data_shards.store import open_store
from medmamba.config import MedMambaConfig
from pipelines.override import override
from pipelines.recipes import recipe
from pipelines.steps.tune import (
    BestEpoch,
    SearchSpace,
    TuneConfig,
    TuneStepConfig,
    _row,
    _winner,
    begin_runs,
    search_space,
)
from pipelines.tracking import Tracking, open_tracking
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.loop import TrainingError

EPOCHS = 3
CONFIG = TuneStepConfig(
    start=TrainStepConfig(model=MedMambaConfig(variant="nano"), train=TrainConfig()), tune=TuneConfig(epochs=EPOCHS)
)


def result(name, epochs, *, error=None):
    """What Tune keeps of a trial: the last report, with (val_auc, val_loss) of each epoch seen by the trial."""
    best, metrics = BestEpoch(), {}
    for epoch, (auc, loss) in enumerate(epochs, 1):
        figures = {"val_auc": auc, "val_loss": loss, "val_accuracy": 0.5}
        metrics = {"trial_id": name, "epoch": epoch, **figures, **best.after(figures)}
    drawn = {"train.optim.lr": 0.004, "train.batch_size": 16}
    return Result(metrics={**metrics, "config": drawn}, checkpoint=None, error=error, path=f"/sweep/{name}")


def winner(*results):
    return _winner([_row(each, CONFIG) for each in results])["trial"]


def test_a_trial_is_judged_by_its_best_epoch_and_not_by_its_last():
    overfitted = result("peak", [(0.80, 0.5), (0.95, 0.3), (0.60, 0.9)])
    steady = result("steady", [(0.70, 0.6), (0.85, 0.4), (0.90, 0.35)])
    assert winner(overfitted, steady) == winner(steady, overfitted) == "peak"


def test_equal_auc_is_decided_by_the_loss_of_the_epoch_that_reached_it():
    sure = result("sure", [(0.9, 0.2), (0.8, 0.9), (0.8, 0.9)])
    unsure = result("unsure", [(0.9, 0.4), (0.9, 0.3), (0.8, 0.1)])
    assert winner(unsure, sure) == "sure"


def test_the_loss_of_an_epoch_with_a_lower_auc_does_not_count():
    assert BestEpoch(auc=0.9, loss=0.4).after({"val_auc": 0.8, "val_loss": 0.1}) == {"best_auc": 0.9, "best_loss": 0.4}


def test_a_resumed_trial_goes_on_from_the_best_epoch_of_its_checkpoint():
    best = BestEpoch()
    best.after({"val_auc": 0.95, "val_loss": 0.3})  # what train.json of the checkpoint holds
    assert best.after({"val_auc": 0.7, "val_loss": 0.2}) == {"best_auc": 0.95, "best_loss": 0.3}


def test_a_trial_that_failed_does_not_win_however_good_it_was():
    diverged = result("diverged", [(0.99, 0.1)], error=TrainingError("the training loss is nan"))
    assert winner(diverged, result("modest", [(0.6, 0.7)] * EPOCHS)) == "modest"


def test_a_sweep_without_a_finished_trial_names_each_reason_once():
    failed = [_row(result(name, [], error=TrainingError("the loss is nan")), CONFIG) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"all 2 trials of the sweep failed: the loss is nan$"):
        _winner(failed)


def test_only_a_trial_that_asha_ended_counts_as_stopped_early():
    rows = [_row(result("full", [(0.5, 1.0)] * EPOCHS), CONFIG), _row(result("short", [(0.5, 1.0)]), CONFIG)]
    assert [(row["epochs"], row["stopped_early"]) for row in rows] == [(EPOCHS, False), (1, True)]


def test_rates_are_drawn_evenly_over_orders_of_magnitude_and_drop_path_evenly():
    config = TuneStepConfig(
        start=CONFIG.start, tune=TuneConfig(space=SearchSpace(lr=(1e-5, 1e-1), drop_path=(0.0, 0.4)))
    )
    space = search_space(config)
    rates = sorted(space["train.optim.lr"].sample() for _ in range(2000))
    assert -3.3 < math.log10(rates[1000]) < -2.7  # drawn uniformly the median would be 0.05
    drops = sorted(space["model.drop_path"].sample() for _ in range(2000))
    assert 0.17 < drops[1000] < 0.23


def test_the_overrides_of_the_winner_are_what_the_training_takes():
    row = _winner([_row(result("one", [(0.9, 0.1)]), CONFIG)])
    changed = override(recipe("quickstart"), row["overrides"])
    assert (changed.train.optim.lr, changed.train.batch_size) == (0.004, 16)


def test_the_driver_makes_the_run_of_a_trial_that_the_trial_then_finds(tmp_path):
    tracking = open_tracking(open_store(str(tmp_path)))
    parent = tracking.client.create_run(tracking.experiment_id).info.run_id
    callback = copy.deepcopy(begin_runs(tracking, parent, 8))
    trial = SimpleNamespace(path="ray/trial_ab12_3_lr=0.1_2026", trial_id="ab12", config={"train.optim.lr": 0.1})
    callback.on_trial_start(iteration=0, trials=[], trial=trial)
    run = tracking.client.get_run(tracking.trial_run(parent, "ab12"))
    assert (run.info.run_name, run.info.status) == ("trial 3/8", "RUNNING")
    assert run.data.params == {"train.optim.lr": "0.1"}


def test_what_tune_keeps_of_its_callbacks_holds_no_address_of_mlflow():
    kept = cloudpickle.dumps(begin_runs(Tracking("http://me:s3cret@host:5000", "0"), "parent", 8))
    assert b"s3cret" not in kept
    cloudpickle.loads(kept).on_trial_start(iteration=0, trials=[], trial=None)
