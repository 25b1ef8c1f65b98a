"""The state of a sweep in the store: what an earlier driver wrote comes back, and nothing else does."""

from __future__ import annotations

import functools
import json
import math
import pickle
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from data_shards.store import Store, open_store
from data_shards.store.fenced_lease import LostLeaseError
from pipelines.sweep.ledger import Ledger, checkpoint_folder
from pipelines.sweep.pickled import drop_pickled
from pipelines.sweep.suggestion import misfit, suggest

SPACE = {"lr": FloatDistribution(1e-4, 1e-1, log=True), "size": CategoricalDistribution((8, 16))}
DRAWN = {"lr": 0.1 + 0.2 - 0.29, "size": 16}
FITS = functools.partial(misfit, space=SPACE, trials=4, epochs=3)


def figures(epoch: int, auc: float = 0.5) -> dict[str, float]:
    return {"epoch": epoch, "val_auc": auc, "val_loss": 1.0, "val_kappa": float("nan")}


def read(out: Store) -> tuple[Ledger, list[str]]:
    """What a next driver finds, and what it says."""
    ledger, told = Ledger(out), []
    ledger.read(FITS, told.append)
    return ledger, told


@pytest.fixture
def out(tmp_path: Path) -> Store:
    """A sweep that was interrupted: trial 1 ended, 2 diverged, 3 is in the middle, 4 failed."""
    store = open_store(str(tmp_path))
    ledger = Ledger(store)
    for number in (1, 2, 3, 4):
        ledger.begin(number, lambda: DRAWN)
        ledger.add_epoch(number, figures(1, 0.1 * number), "running")
    ledger.add_epoch(3, figures(2), "running")
    ledger.add_epoch(1, figures(2), "stopped")
    ledger.end(2, "diverged", "the loss is nan")
    ledger.end(4, "failed", "the machine was lost")
    return store


def test_the_records_come_back_to_the_last_bit(out):
    ledger, told = read(out)
    assert told == []
    assert [record.state for record in ledger.records()] == ["stopped", "diverged", "running", "failed"]
    assert [record.overrides for record in ledger.records()] == [DRAWN] * 4
    assert "val_kappa" not in ledger.records()[0].last  # JSON has no NaN


def test_what_is_left_to_do_is_what_was_not_over(out):
    ledger, _ = read(out)
    assert ledger.to_do(6) == [3, 4, 5, 6]
    assert [record.number for record in ledger.over()] == [1, 2]


def test_a_trial_started_again_keeps_its_id_and_overrides(out):
    ledger, _ = read(out)
    before = ledger.records()[3]
    begun = ledger.begin(4, lambda: pytest.fail("it has its overrides"))
    assert (begun.id, begun.overrides, begun.epochs) == (before.id, before.overrides, before.epochs)
    assert (begun.state, begun.reason) == ("running", "")


def test_epochs_return_in_the_order_they_were_reported(out):
    ledger, _ = read(out)
    order = [(record.number, epoch) for record, epoch in ledger.events()]
    assert order == [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (1, 2)]


def test_an_epoch_that_is_known_is_recorded_once(out):
    ledger, _ = read(out)
    ledger.add_epoch(3, figures(2, 0.9), "stopped")
    assert ledger.records()[2] == read(out)[0].records()[2]
    assert ledger.records()[2].last["val_auc"] == 0.5


def test_a_driver_that_lost_its_run_writes_nothing(out):
    def lost() -> None:
        raise LostLeaseError("another driver has taken the run")

    ledger = Ledger(out, check=lost)
    ledger.read(FITS, print)
    before = {key: out.get(key) for key in out.list()}
    with pytest.raises(LostLeaseError):
        ledger.end(3, "ended")
    assert {key: out.get(key) for key in out.list()} == before
    assert isinstance(ledger.broken, LostLeaseError)


def test_checkpoints_are_deleted_and_records_stay(out):
    ledger, _ = read(out)
    checkpoint_folder(out, ledger.records()[0].id).put("checkpoints/step-0000000001/train.json", b"{}")
    ledger.delete_checkpoints()
    assert list(out.list()) == [f"trials/{number}.json" for number in (1, 2, 3, 4)]


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


DAMAGED = {
    "torn": lambda record: json.dumps(record)[:-20].encode(),
    "empty": lambda record: b"",
    "deep": lambda record: b"[" * 100_000,
    "no text": lambda record: b"\xff\xfe\x00",
    "a pickle": lambda record: pickle.dumps(Evil(Path("ran"))),
    "a list": lambda record: b"[]",
    "unknown field": lambda record: json.dumps({**record, "code": "import os"}).encode(),
    "another key": lambda record: json.dumps({**record, "overrides": {"train.init": "/etc/passwd"}}).encode(),
    "value outside": lambda record: json.dumps({**record, "overrides": {"lr": 5.0, "size": 16}}).encode(),
    "value a text": lambda record: json.dumps({**record, "overrides": {"lr": "0.01", "size": 16}}).encode(),
    "not finite": lambda record: json.dumps({**record, "overrides": {"lr": float("nan"), "size": 16}}).encode(),
    "path as id": lambda record: json.dumps({**record, "id": "../../x"}).encode(),
    "quote in id": lambda record: json.dumps({**record, "id": "a' or 'a'"}).encode(),
    "another's number": lambda record: json.dumps({**record, "number": 2}).encode(),
    "huge number": lambda record: json.dumps({**record, "number": 10**400}).encode(),
    "more epochs": lambda record: json.dumps({**record, "epochs": record["epochs"] * 4}).encode(),
    "no auc": lambda record: json.dumps({**record, "epochs": [{"order": 1, "metrics": {}}]}).encode(),
    "no auc can be 5": lambda record: json.dumps(
        {**record, "epochs": [{"order": 1, "metrics": {"val_auc": 5.0, "val_loss": 1.0}}]}
    ).encode(),
    "one order twice": lambda record: json.dumps({**record, "epochs": record["epochs"] * 2}).encode(),
    "ended without an epoch": lambda record: json.dumps({**record, "epochs": [], "state": "ended"}).encode(),
    "unknown state": lambda record: json.dumps({**record, "state": "won"}).encode(),
    "a newer format": lambda record: json.dumps({**record, "format": 2}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_ignored_and_its_trial_restarts(out, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out.put("trials/3.json", damage(json.loads(out.get("trials/3.json"))))
    ledger, told = read(out)
    assert ledger.to_do(4) == [4, 3]
    (line,) = told
    assert "trials/3.json was edited or damaged" in line
    assert line.isprintable()
    assert len(line) < 500
    assert not (tmp_path / "ran").exists()
    assert ledger.begin(3, lambda: DRAWN).epochs == ()


def test_of_two_records_with_one_id_the_second_is_ignored(out):
    first, second = (json.loads(out.get(f"trials/{number}.json")) for number in (1, 3))
    out.put("trials/3.json", json.dumps({**second, "id": first["id"]}).encode())
    ledger, told = read(out)
    assert ledger.to_do(4) == [4, 3]
    assert "another trial has its id" in told[0]


def test_a_suggestion_follows_from_seed_number_and_ended_trials(out):
    ledger, _ = read(out)
    space = dict(SPACE)
    drawn = [suggest(space, seed=1, number=number, over=ledger.over()) for number in (5, 6, 5)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert suggest(space, seed=2, number=5, over=ledger.over()) != drawn[0]


def test_suggestions_follow_good_trials_once_there_are_enough(tmp_path):
    ledger = Ledger(open_store(str(tmp_path)))
    space = {"lr": FloatDistribution(1e-4, 1e-1, log=True)}
    for number in range(1, 51):
        drawn = suggest(space, seed=0, number=number, over=ledger.over())
        ledger.begin(number, lambda drawn=drawn: drawn)
        ledger.add_epoch(number, figures(1, 1 - abs(math.log10(drawn["lr"] / 0.02)) / 3), "ended")
    found = [record.last["val_auc"] for record in ledger.records()]
    assert sum(found[40:]) / 10 > sum(found[:10]) / 10 + 0.2 / 3


def test_an_earlier_versions_pickle_is_deleted_unread(tmp_path):
    out, told = open_store(str(tmp_path / "store")), []
    evil = pickle.dumps(Evil(tmp_path / "ran"))
    trial = "ray/trial_3befb4eb_1_train_optim_lr=0.0020_2026-12-01_00-04-52"
    for key in ("ray/tuner.pkl", "ray/trainable.pkl", "ray/searcher-state-1.pkl", f"{trial}/error.pkl"):
        out.put(key, evil)
    state = {"trial_data": [], "runner_data": {"_type": "CLOUDPICKLE_FALLBACK", "value": evil.hex()}}
    out.put("ray/experiment_state-2026-12-01_00-04-52.json", json.dumps(state).encode())
    out.put(f"{trial}/checkpoint_000000/train.json", b'{"epoch": 1}')
    out.put(f"{trial}/checkpoint_000001/train.json", b'{"epoch": 2}')
    out.put("ray/trial_c7fb88c2_2_x/checkpoint_000000/train.json", b"{torn")
    drop_pickled(out, Ledger(out), told.append)
    assert "starts again; 2 trials with 2 epochs are lost" in told[0]
    assert list(out.list()) == []
    assert not (tmp_path / "ran").exists()
    drop_pickled(out, Ledger(out), told.append)
    assert len(told) == 1
