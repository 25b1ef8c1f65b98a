"""Which trial of a sweep wins, from the epochs that its trials recorded."""

import math

import pytest

from data_shards.store import open_store
from medmamba.config import MedMambaConfig
from pipelines.override import override
from pipelines.recipes import recipe
from pipelines.steps.search import SearchSpace, TuneConfig, TuneStepConfig, search_space
from pipelines.steps.tune import _check_reasons, _end_run, _row, _winner
from pipelines.sweep.ledger import Ledger, TrialEpoch, TrialRecord
from pipelines.sweep.suggestion import suggest
from pipelines.tracking import open_tracking
from pipelines.worker.config import TrainConfig, TrainStepConfig

EPOCHS = 3
CONFIG = TuneStepConfig(
    start=TrainStepConfig(model=MedMambaConfig(variant="nano"), train=TrainConfig()), tune=TuneConfig(epochs=EPOCHS)
)


def record(name, epochs, *, number=1, state="ended", reason=""):
    """A trial with the (val_auc, val_loss) of each of its epochs."""
    drawn = {"train.optim.lr": 0.004, "train.batch_size": 16}
    seen = [{"val_auc": auc, "val_loss": loss, "val_accuracy": 0.5} for auc, loss in epochs]
    kept = tuple(TrialEpoch(order=order, metrics=metrics) for order, metrics in enumerate(seen, 1))
    return TrialRecord(
        number=number, id=name.encode().hex().ljust(8, "0")[:8], overrides=drawn, epochs=kept, state=state,
        reason=reason,
    )  # fmt: skip


def winner(*records):
    return _winner([_row(each, CONFIG) for each in records])["trial"]


def test_a_trial_is_judged_by_its_best_epoch_and_not_by_its_last():
    overfitted = record("peak", [(0.80, 0.5), (0.95, 0.3), (0.60, 0.9)])
    steady = record("steady", [(0.70, 0.6), (0.85, 0.4), (0.90, 0.35)])
    assert winner(overfitted, steady) == winner(steady, overfitted) == overfitted.id


def test_equal_auc_is_decided_by_that_epochs_loss():
    sure = record("sure", [(0.9, 0.2), (0.8, 0.9), (0.8, 0.9)])
    unsure = record("unsure", [(0.9, 0.4), (0.9, 0.3), (0.8, 0.1)])
    assert winner(unsure, sure) == sure.id


def test_the_loss_of_an_epoch_with_a_lower_auc_does_not_count():
    row = _row(record("one", [(0.9, 0.4), (0.8, 0.1)]), CONFIG)
    assert (row["metrics"]["best_auc"], row["metrics"]["best_loss"]) == (0.9, 0.4)
    assert (row["metrics"]["val_auc"], row["metrics"]["val_loss"]) == (0.8, 0.1)


def test_a_trial_that_failed_does_not_win_however_good_it_was():
    diverged = record("diverged", [(0.99, 0.1)], state="diverged", reason="the training loss is nan")
    modest = record("modest", [(0.6, 0.7)] * EPOCHS)
    assert winner(diverged, modest) == modest.id


def test_a_sweep_without_a_finished_trial_names_each_reason_once():
    failed = [_row(record(name, [], state="diverged", reason="the loss is nan"), CONFIG) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"all 2 trials of the sweep failed: the loss is nan$"):
        _winner(failed)


def test_only_a_trial_ended_before_its_last_epoch_stopped_early():
    rows = [_row(record("full", [(0.5, 1.0)] * EPOCHS), CONFIG), _row(record("short", [(0.5, 1.0)]), CONFIG)]
    assert [(row["epochs"], row["stopped_early"]) for row in rows] == [(EPOCHS, False), (1, True)]


def test_a_diverged_trial_is_a_result_and_failures_are_reported(tmp_path):
    ledger = Ledger(open_store(str(tmp_path)))
    for number, state in enumerate(("ended", "diverged"), 1):
        ledger.begin(number, dict)
        ledger.end(number, state, "the training loss is nan" if state == "diverged" else "")
    _check_reasons(ledger, {})
    ledger.begin(3, dict)
    ledger.end(3, "failed", "a trial was killed or crashed: run the same command to resume")
    cause = OSError("killed")
    with pytest.raises(ValueError, match=r"1 of 3 trials failed for reasons other than divergence") as told:
        _check_reasons(ledger, {3: cause})
    assert str(told.value).endswith("(a trial was killed or crashed); fix the cause and run the same command to try "
                                    "them again")  # fmt: skip
    assert told.value.__cause__ is cause


def test_rates_are_drawn_log_evenly_and_drop_path_evenly():
    config = TuneStepConfig(
        start=CONFIG.start, tune=TuneConfig(space=SearchSpace(lr=(1e-5, 1e-1), drop_path=(0.0, 0.4)))
    )
    space = search_space(config)
    drawn = [suggest(space, seed=0, number=number, over=()) for number in range(2, 402)]
    rates = sorted(each["train.optim.lr"] for each in drawn)
    assert -3.4 < math.log10(rates[200]) < -2.6  # drawn uniformly the median would be 0.05
    drops = sorted(each["model.drop_path"] for each in drawn)
    assert 0.16 < drops[200] < 0.24


def test_the_overrides_of_the_winner_are_what_the_training_takes():
    row = _winner([_row(record("one", [(0.9, 0.1)]), CONFIG)])
    changed = override(recipe("quickstart"), row["overrides"])
    assert (changed.train.optim.lr, changed.train.batch_size) == (0.004, 16)


def test_a_stopped_trials_run_gets_its_epochs_from_the_record(tmp_path):
    tracking = open_tracking(open_store(str(tmp_path)))
    parent = tracking.client.create_run(tracking.experiment_id).info.run_id
    kept = record("stopped", [(0.5, 1.0), (0.6, 0.9), (0.7, 0.8)], state="stopped")
    epochs = [{"train_loss": 2.0 - n, "step": 4.0 * n, **each.metrics} for n, each in enumerate(kept.epochs, 1)]
    kept = kept.model_copy(
        update={"epochs": tuple(TrialEpoch(order=n, metrics=each) for n, each in enumerate(epochs, 1))}
    )
    run_id = tracking.trial_run(parent, kept.id, name="trial 1/8")
    tracking.log_epoch(run_id, {**epochs[0], "epoch": 1}, [1.5, 1.4, 1.3, 1.2])
    assert _end_run(tracking, parent, kept) == run_id
    seen = [(point.step, point.value) for point in tracking.client.get_metric_history(run_id, "train_loss")]
    assert sorted(seen) == [(1, 1.0), (2, 0.0), (3, -1.0)]
    assert len(tracking.client.get_metric_history(run_id, "step_loss")) == 4
    assert tracking.client.get_run(run_id).info.status == "FINISHED"
