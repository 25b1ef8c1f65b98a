"""What a training logs while a real MLflow server is away: kept, sent later, each point once and in order."""

from __future__ import annotations

import json
import threading
import time

import pytest
from absent_server import AbsentServer, absent_server
from fault_proxy import Schedule, fault_proxy

from data_shards.store import open_store, outage
from data_shards.store.outage import Notice, listening
from pipelines.steps.tune import complete_run
from pipelines.sweep.ledger import TrialEpoch, TrialRecord
from pipelines.tracking import AwayError, PatienceError, Tracking, TrackingError, open_tracking
from pipelines.tracking import client as tracking_client
from pipelines.tracking.outbox import Outbox

STEPS = 3  # of an epoch


@pytest.fixture
def heard(monkeypatch):
    """What is reported during the test; what is absent for 0.5 s is."""
    monkeypatch.setattr(outage, "NOTICE_S", 0.5)
    monkeypatch.setattr(tracking_client, "LONGEST_PAUSE_S", 1.0)
    notices: list[Notice] = []
    with listening(notices.append):
        yield notices


@pytest.fixture
def run(mlflow_server, tmp_path):
    """(tracking without a proxy, id of a run)."""
    store = open_store(str(tmp_path))
    tracking = open_tracking(store, mlflow_server)
    return tracking, tracking.step_run(store.at("runs/r/train"), run="r", step="train")


def through(proxy: str, tracking: Tracking, patience_s: float = 60.0) -> Tracking:
    return Tracking(proxy, tracking.experiment_id, patience_s)


def away_for(proxy: AbsentServer, seconds: float) -> None:
    proxy.leave()
    threading.Timer(seconds, proxy.come_back).start()


def log(outbox: Outbox, *epochs: int) -> None:
    for epoch in epochs:
        outbox.epoch(metrics(epoch), losses(epoch))


def metrics(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "step": STEPS * epoch, "train_loss": 1 / epoch, "val_auc": 0.5}


def losses(epoch: int) -> list[float]:
    return [epoch + n / 10 for n in range(STEPS)]


def curves(run) -> dict[str, list[tuple[int, float]]]:
    tracking, run_id = run
    names = ("train_loss", "val_auc", "step_loss")
    return {name: [(p.step, p.value) for p in tracking.client.get_metric_history(run_id, name)] for name in names}


def expected(epochs: int) -> dict[str, list[tuple[int, float]]]:
    every = range(1, epochs + 1)
    steps = [(STEPS * (epoch - 1) + n + 1, loss) for epoch in every for n, loss in enumerate(losses(epoch))]
    return {
        "train_loss": [(epoch, 1 / epoch) for epoch in every],
        "val_auc": [(epoch, 0.5) for epoch in every],
        "step_loss": steps,
    }


def test_training_does_not_wait_and_points_arrive_once_in_order(run, mlflow_server, heard):
    with absent_server(mlflow_server) as proxy, Outbox(through(proxy.address, run[0]), run[1]) as outbox:
        log(outbox, 1)
        deadline = time.monotonic() + 30
        while outbox.unsent() and time.monotonic() < deadline:
            time.sleep(0.05)
        proxy.leave()
        began = time.monotonic()
        log(outbox, 2, 3, 4)
        outbox.tags({"note": "kept too"})
        assert time.monotonic() - began < 0.1, "the training waited for MLflow"
        time.sleep(4)
        assert curves(run) == expected(1)
        assert [entry["metrics"].get("epoch") for entry in outbox.unsent()] == [2, 3, 4, None]
        proxy.come_back()
    assert curves(run) == expected(4)
    assert run[0].client.get_run(run[1]).data.tags["note"] == "kept too"
    away, back = [str(notice) for notice in heard if proxy.address in notice.who]
    assert away.startswith(f"MLflow at {proxy.address} has not answered since ")
    assert away.endswith("work continues; log entries are kept and sent later, for at most 1 minute")
    assert "answers again after" in back
    assert back.endswith("sending the log entries of 3 epochs")


def test_a_call_whose_answer_was_lost_leaves_one_point(run, mlflow_server, heard):
    schedule = Schedule(rate=0.4, kinds=("lost_answer",), seed=2)
    with fault_proxy(mlflow_server, schedule) as proxy, Outbox(through(proxy, run[0]), run[1]) as outbox:
        log(outbox, *range(1, 9))
    assert curves(run) == expected(8)
    assert schedule.counts["lost_answer"] >= 3


def test_unsent_points_of_a_killed_training_are_sent_on_resume(run, mlflow_server, heard):
    with absent_server(mlflow_server) as proxy:
        killed = Outbox(through(proxy.address, run[0], 5.0), run[1])
        log(killed, 1)
        while killed.unsent():
            time.sleep(0.05)
        proxy.leave()
        log(killed, 2, 3)
        unsent = json.loads(json.dumps(killed.unsent()))  # in the checkpoint after epoch 3; then the process is killed
    history = [metrics(epoch) for epoch in (1, 2, 3)]
    with Outbox(through(mlflow_server, run[0]), run[1]) as outbox:
        outbox.resume(history, unsent)
        log(outbox, 4)
    assert curves(run) == expected(4)


def test_epochs_that_only_the_history_has_are_sent_from_it(run, mlflow_server):
    """A checkpoint of an earlier version: the losses of the steps are lost, the metrics of the epochs are not."""
    with Outbox(through(mlflow_server, run[0]), run[1]) as outbox:
        outbox.resume([metrics(epoch) for epoch in (1, 2, 3)])
        log(outbox, 4)
    found = curves(run)
    assert found["train_loss"] == expected(4)["train_loss"]
    assert [step for step, _ in found["step_loss"]] == [10, 11, 12]


def test_half_an_epoch_that_was_sent_is_completed(run, mlflow_server):
    run[0].log_metrics(run[1], {"step_loss": losses(1)[0]}, step=1)  # killed between two calls
    with Outbox(through(mlflow_server, run[0]), run[1]) as outbox:
        log(outbox, 1)
    assert curves(run) == expected(1)


def test_a_stoppable_trial_waits_until_its_epoch_is_sent(run, mlflow_server):
    outbox = Outbox(through(mlflow_server, run[0]), run[1])
    log(outbox, 1)
    outbox.settle()
    assert curves(run) == expected(1)  # nothing was closed


def test_an_absent_server_is_not_waited_for_and_caught_up_later(run, mlflow_server, heard):
    with absent_server(mlflow_server) as proxy:
        outbox = Outbox(through(proxy.address, run[0], 5.0), run[1])
        log(outbox, 1)
        outbox.settle()
        proxy.leave()
        began = time.monotonic()
        for epoch in (2, 3):
            log(outbox, epoch)
            outbox.settle()
        assert time.monotonic() - began < 10
    epochs = tuple(TrialEpoch(order=epoch, metrics={**metrics(epoch), "val_loss": 1.0}) for epoch in (1, 2, 3))
    record = TrialRecord(number=1, id="0123abcd", overrides={}, epochs=epochs, state="stopped")
    complete_run(through(mlflow_server, run[0]), run[1], record)
    complete_run(through(mlflow_server, run[0]), run[1], record)
    assert curves(run)["train_loss"] == expected(3)["train_loss"]
    assert curves(run)["step_loss"] == expected(1)["step_loss"]


def test_a_run_that_was_deleted_is_an_error_of_the_next_call(run, mlflow_server):
    run[0].client.delete_run(run[1])
    outbox = Outbox(through(mlflow_server, run[0]), run[1])
    log(outbox, 1)
    with pytest.raises(TrackingError, match="must be in the 'active' state"):
        outbox.close()
    with pytest.raises(TrackingError):
        log(outbox, 2)


def test_a_server_gone_for_good_ends_it_with_a_remedy(run, mlflow_server, heard):
    with absent_server(mlflow_server) as proxy:
        proxy.leave()
        outbox = Outbox(through(proxy.address, run[0], 5.0), run[1])
        began = time.monotonic()
        log(outbox, 1)
        with pytest.raises(
            PatienceError, match=r"longer than 5 s \(--placement.patience-s\): start it, then run the same"
        ):
            outbox.close()
        assert 3 < time.monotonic() - began < 15
        assert len(outbox.unsent()) == 1
        assert [notice.over_after_s for notice in heard if proxy.address in notice.who] == [0.0]


def test_a_failed_training_sends_the_rest_and_keeps_its_error(run, mlflow_server, heard):
    with absent_server(mlflow_server) as proxy:
        proxy.leave()
        began = time.monotonic()

        def train() -> None:
            with Outbox(through(proxy.address, run[0]), run[1]) as outbox:
                log(outbox, 1)
                raise ValueError("the loss")

        with pytest.raises(ValueError, match="the loss"):
            train()
        assert time.monotonic() - began < 10


def test_a_driver_waits_for_step_ends_but_not_the_first_begin(run, mlflow_server, tmp_path, heard):
    store = open_store(str(tmp_path / "other"))
    with absent_server(mlflow_server) as proxy:
        tracking = through(proxy.address, run[0])
        proxy.leave()
        began = time.monotonic()
        with pytest.raises(AwayError), tracking.running(store.at("runs/r/shard"), run="r", step="shard"):
            pass
        assert time.monotonic() - began < 15
        proxy.come_back()
        with tracking.running(store.at("runs/r/shard"), run="r", step="shard") as run_id:
            away_for(proxy, 3)
            tracking.log_metrics(run_id, {"num_images": 3.0})
            away_for(proxy, 3)
        away_for(proxy, 3)
        with tracking.running(store.at("runs/r/train"), run="r", step="train") as later:
            assert run[0].client.get_run(later).info.status == "RUNNING"
    points = run[0].client.get_metric_history(run_id, "num_images")
    assert [(point.step, point.value) for point in points] == [(0, 3.0)]
    assert [run[0].client.get_run(each).info.status for each in (run_id, later)] == ["FINISHED", "FINISHED"]
