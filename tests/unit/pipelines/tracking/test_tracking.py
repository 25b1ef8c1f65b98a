"""Runs on a SQLite file: found again, never doubled, never left running."""

import pickle
import socket
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from data_shards.store import open_store
from pipelines.tracking import Tracking, TrackingError, open_tracking, public_address
from pipelines.tracking.log import dotted
from pipelines.tracking.runs import REASON, RUN_FILE


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(str(tmp_path_factory.mktemp("a store with spaces")))


@pytest.fixture(scope="module")
def tracking(store):
    return open_tracking(store)


@pytest.fixture
def out(store, request):
    return store.at("runs", request.node.name, "train")


def status(tracking, run_id: str) -> str:
    return tracking.client.get_run(run_id).info.status


def num_runs(tracking, out) -> int:
    return len(tracking.client.search_runs([tracking.experiment_id], f"tags.`medmamba.record` = '{out.uri}'"))


def test_runs_and_artifacts_lie_in_the_store(store, tracking, out):
    run_id = tracking.step_run(out, run="a", step="train")
    assert store.head("mlflow.db")
    tracking.client.log_text(run_id, "x", "note.txt")
    (kept,) = store.list("mlflow-artifacts")
    assert kept.endswith(f"{run_id}/artifacts/note.txt")


def test_a_resumed_step_is_the_same_run_and_runs_again(tracking, out):
    first = tracking.step_run(out, run="a", step="train", params={"optim": {"lr": 0.1}})
    tracking.finish(first, "FAILED")
    assert tracking.step_run(out, run="a", step="train", params={"optim": {"lr": 0.1}}) == first
    assert status(tracking, first) == "RUNNING"
    assert tracking.client.get_run(first).data.params == {"optim.lr": "0.1"}


def test_a_run_whose_id_was_not_written_down_is_found_by_its_tag(tracking, out):
    first = tracking.step_run(out, run="a", step="train")
    out.delete(RUN_FILE)
    assert tracking.step_run(out, run="a", step="train") == first
    assert out.head(RUN_FILE)
    assert num_runs(tracking, out) == 1


def test_an_id_unknown_to_this_mlflow_names_the_other_server(store, tracking, out, tmp_path):
    tracking.step_run(out, run="a", step="train")
    elsewhere = open_tracking(store, f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(TrackingError, match=r"mlflow\.db.*does not have"):
        elsewhere.step_run(out, run="a", step="train")


@pytest.mark.parametrize(
    ("error", "ends_as"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_no_run_is_left_running(tracking, store, error, ends_as):
    out = store.at("runs", ends_as, "train")
    try:
        with tracking.running(out, run="a", step="train") as run_id:
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert status(tracking, run_id) == ends_as


def test_trials_are_nested_found_again_and_closed(tracking, out):
    parent = tracking.step_run(out, run="a", step="tune")
    first = tracking.trial_run(parent, "t1", {"train.optim.lr": 0.1})
    assert tracking.trial_run(parent, "t1") == first
    second = tracking.trial_run(parent, "t2")
    tracking.finish(first)
    assert tracking.client.get_run(first).data.tags["mlflow.parentRunId"] == parent
    assert tracking.close_trials(parent) == 1
    assert (status(tracking, first), status(tracking, second)) == ("FINISHED", "KILLED")


def test_a_late_log_of_a_trial_does_not_reopen_its_run(tracking, out):
    parent = tracking.step_run(out, run="a", step="tune")
    begun = tracking.trial_run(parent, "t1", {}, name="trial 1/2")
    tracking.close_trials(parent)
    assert tracking.find_trial(parent, "t1", {}, name="trial 1/2") == begun
    assert status(tracking, begun) == "KILLED"
    own = tracking.find_trial(parent, "t2", {}, name="trial 2/2")  # where the driver could not make it
    assert status(tracking, own) == "RUNNING"
    tracking.finish(own)
    tracking.reopen_trials(parent)
    assert (status(tracking, begun), status(tracking, own)) == ("RUNNING", "FINISHED")
    tracking.finish(parent, "KILLED")
    assert status(tracking, tracking.find_trial(parent, "t3", {}, name="trial 3/3")) == "KILLED"


def test_epochs_are_logged_by_epoch_and_losses_by_step(tracking, out):
    run_id = tracking.step_run(out, run="a", step="train")
    for epoch in (1, 2):
        metrics = {"epoch": epoch, "step": epoch * 3, "val_auc": epoch / 10}
        tracking.log_epoch(run_id, metrics, [epoch + i / 10 for i in range(3)])
    curve = {name: [(m.step, m.value) for m in tracking.client.get_metric_history(run_id, name)] for name in
             ("val_auc", "step_loss")}  # fmt: skip
    assert curve["val_auc"] == [(1, 0.1), (2, 0.2)]
    assert curve["step_loss"] == [(1, 1.0), (2, 1.1), (3, 1.2), (4, 2.0), (5, 2.1), (6, 2.2)]


def test_more_losses_and_parameters_than_a_call_takes_arrive(tracking, out):
    run_id = tracking.step_run(out, run="a", step="train", params={f"p{i}": "x" * 7000 for i in range(150)})
    tracking.log_epoch(run_id, {"epoch": 1, "step": 1500}, [1.0] * 1500)
    assert len(tracking.client.get_run(run_id).data.params) == 150
    assert tracking.client.get_run(run_id).data.metrics["step_loss"] == 1.0


def test_a_worker_gets_it_by_pickle(tracking, out):
    run_id = tracking.step_run(out, run="a", step="train")
    copy: Tracking = pickle.loads(pickle.dumps(tracking))
    copy.log_metrics(run_id, {"loss": 1.5}, step=2)
    assert tracking.client.get_run(run_id).data.metrics == {"loss": 1.5}


def opened(uri: str) -> str:
    return open_tracking(open_store(uri)).experiment_id


def test_two_processes_may_open_a_fresh_store_at_once(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert len(set(pool.map(opened, [str(tmp_path / "fresh")] * 2))) == 1


def test_a_shared_store_demands_a_server():
    with pytest.raises(TrackingError, match="mlflow server"):
        open_tracking(open_store("s3://bucket/prefix"))
    with pytest.raises(TrackingError, match="mlflow server"):
        open_tracking(open_store("s3://bucket/prefix"), "sqlite:////tmp/x.db")


def test_an_unresponsive_server_is_named_within_15_seconds(store):
    with socket.socket() as silent:  # accepts, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TrackingError, match="cannot be reached") as told:
            open_tracking(store, uri)
        assert time.monotonic() - began < 10
    with pytest.raises(TrackingError, match=r"Connection refused.*MLFLOW_TRACKING_URI"):
        open_tracking(store, uri)
    assert "secret" not in str(told.value)


@pytest.mark.timeout(60)
def test_a_server_that_goes_silent_is_named_within_15_seconds(out):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        lost = Tracking(f"http://127.0.0.1:{silent.getsockname()[1]}", "1")
        began = time.monotonic()
        with pytest.raises(TrackingError, match="cannot be reached"):
            lost.log_metrics("r", {"loss": 1.0})
        assert time.monotonic() - began < 15


def test_a_file_that_is_no_database_is_an_error_of_the_store(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to be looked at " * 10)
    with pytest.raises(TrackingError, match="SQLite"):
        open_tracking(open_store(str(tmp_path)))


def test_a_file_where_the_store_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="another store"):
        open_tracking(open_store(str(tmp_path / "file")))


def test_addresses_are_shown_without_passwords():
    assert public_address("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert public_address("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_nested_parameters_become_dotted():
    assert dotted({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_a_step_started_with_another_configuration_is_a_new_run(tracking, store):
    """Also where its folder was deleted: parameters of an MLflow run cannot change."""
    out = store.at("runs", "anew", "train")
    ids = []
    for epochs in (1, 2, 2):
        out.put("config.json", f'{{"epochs": {epochs}}}'.encode())
        ids.append(tracking.step_run(out, run="anew", step="train", params={"epochs": epochs}))
        out.delete("config.json")
        out.delete(RUN_FILE)
    assert ids[0] != ids[1] == ids[2]


def test_trials_that_a_killed_driver_forgot_are_removed(tracking, out):
    parent = tracking.step_run(out, run="a", step="tune")
    kept, _ = tracking.trial_run(parent, "known"), tracking.trial_run(parent, "forgotten")
    tracking.drop_trials(parent, ["known"])
    where = f"tags.`mlflow.parentRunId` = '{parent}'"
    assert [run.info.run_id for run in tracking.client.search_runs([tracking.experiment_id], where)] == [kept]


def test_a_password_in_the_address_is_not_shown():
    assert "secret" not in repr(Tracking("http://me:secret@host", "1"))


def test_a_run_that_failed_says_why_until_it_is_tried_again(tracking, out):
    with pytest.raises(ValueError), tracking.running(out, run="a", step="train") as run_id:
        raise ValueError("a is 3, must be 2; set 2")
    assert tracking.client.get_run(run_id).data.tags[REASON] == "a is 3, must be 2; set 2"
    with tracking.running(out, run="a", step="train") as again:
        assert REASON not in tracking.client.get_run(run_id).data.tags
    assert (again, status(tracking, run_id)) == (run_id, "FINISHED")


def test_a_killed_drivers_run_and_trials_are_closed_no_others(tracking, store):
    run, other = store.at("runs", "killed"), store.at("runs", "killed-2")
    left = tracking.step_run(run.at("tune"), run="killed", step="tune")
    trial = tracking.trial_run(left, "2ad399ca", name="trial 3/4")
    finished = tracking.step_run(run.at("shard"), run="killed", step="shard")
    tracking.finish(finished)
    lives = tracking.step_run(other.at("tune"), run="killed-2", step="tune")
    assert tracking.close_killed(run) == 2
    states = [status(tracking, each) for each in (left, trial, finished, lives)]
    assert states == ["KILLED", "KILLED", "FINISHED", "RUNNING"]
    found = tracking.client.get_run(trial)
    assert (found.info.run_name, found.data.tags["medmamba.trial"]) == ("trial 3/4", "2ad399ca")
    assert tracking.trial_run(left, "2ad399ca", name="trial 3/4") == trial
    tracking.finish(lives)


def test_a_full_disk_is_named_where_mlflow_keeps_its_file_on_it(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        with pytest.raises(TrackingError, match=rf"the disk of {tmp_path}.*full") as error:
            open_tracking(open_store(str(tmp_path)))
        assert "sqlite3" not in str(error.value)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
