"""ASHA after an interruption: refilled from the ledger it decides what it would have decided."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from data_shards.store import Store, open_store
from pipelines.sweep.ledger import Ledger
from pipelines.sweep.seams import Asha

TRIALS, EPOCHS, AT_ONCE = 12, 9, 3


def aucs(seed: int) -> dict[tuple[int, int], float]:
    """Trial and epoch -> AUC; the trials differ, and get better."""
    draw = random.Random(seed)
    levels = {number: draw.random() for number in range(1, TRIALS + 1)}
    return {
        (number, epoch): levels[number] * epoch / (epoch + 1) + draw.random() / 10
        for number in levels
        for epoch in range(1, EPOCHS + 1)
    }


def sweep(out: Store, seed: int, *, interrupted_after: int = 0, refills: bool = True) -> list[tuple[int, int, str]]:
    """The decisions (trial, epoch, decision) of a sweep of several trials at once.

    After so many of them the driver is replaced by another one, which knows what lies in the store.
    """
    auc, turns = aucs(seed), random.Random(seed + 1)
    ledger, asha = Ledger(out), Asha(EPOCHS, 1, 3)
    waiting, running, decided = list(range(1, TRIALS + 1)), dict[int, int](), []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number = waiting.pop(0)
            ledger.begin(number, lambda: {"lr": 0.1})
            asha.on_trial_add(None, tuned(number))
            running[number] = 0
        number = turns.choice(sorted(running))
        running[number] += 1
        epoch = running[number]
        result = {"epoch": epoch, "val_auc": auc[number, epoch]}
        decision = asha.on_trial_result(None, tuned(number), result)
        decided.append((number, epoch, decision))
        state = "running" if decision == "CONTINUE" else "ended" if epoch == EPOCHS else "stopped"
        ledger.add_epoch(number, {**result, "val_loss": 1.0}, state)
        if decision == "STOP":
            asha.on_trial_complete(None, tuned(number), result)
            del running[number]
        if len(decided) == interrupted_after:
            ledger, asha = Ledger(out), Asha(EPOCHS, 1, 3)
            ledger.read(lambda record: "", pytest.fail)
            if refills:
                asha.refill(ledger)
            for number in running:
                asha.on_trial_add(None, tuned(number))
    return decided


def tuned(number: int) -> SimpleNamespace:
    """What ASHA sees of a trial: Tune gives it an id of its own in each process."""
    return SimpleNamespace(trial_id=f"any-{random.random()}", config={"number": number})


@pytest.mark.parametrize("seed", range(3))
def test_asha_stops_the_same_trials_wherever_interrupted(tmp_path, seed):
    undisturbed = sweep(open_store(str(tmp_path / "undisturbed")), seed)
    assert {decision for _, epoch, decision in undisturbed if epoch < EPOCHS} == {"CONTINUE", "STOP"}
    for after in range(1, len(undisturbed), 5):
        out = open_store(str(tmp_path / str(after)))
        assert sweep(out, seed, interrupted_after=after) == undisturbed


def test_without_its_rungs_asha_would_decide_otherwise(tmp_path):
    undisturbed = sweep(open_store(str(tmp_path / "undisturbed")), 0)
    half = len(undisturbed) // 2
    assert sweep(open_store(str(tmp_path / "half")), 0, interrupted_after=half, refills=False) != undisturbed
