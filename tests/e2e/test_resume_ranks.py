"""Two Ray Train workers at ZeRO stages that cut the optimiser's state (1) and the weights too (3): killed, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
from chain import TINY, command, environment, medmamba

from data_shards.store import open_store
from pipelines.worker.checkpoint.stored import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
EPOCHS = 5


def validated(facts: dict) -> list[dict[str, float]]:
    """What validation found after each epoch."""
    return [{name: value for name, value in epoch.items() if name.startswith("val_")} for epoch in facts["history"]]


@pytest.mark.parametrize("zero_stage", ["1", "3"])
def test_two_killed_workers_change_nothing_in_the_end(zero_stage, tmp_path):
    arguments = [
        "train", *TINY, "--train.epochs", str(EPOCHS), "--run", "two", "--json",
        "--placement.workers", "2", "--placement.zero-stage", zero_stage,
    ]  # fmt: skip
    whole = medmamba(*arguments, "--store", str(tmp_path / "whole"), cwd=tmp_path, timeout_s=500)
    expected = json.loads(whole.stdout)["train"]

    store = str(tmp_path / "killed")
    driver = subprocess.Popen(
        command(*arguments, "--store", store), env=environment(), cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    checkpoints = Checkpoints(open_store(f"{store}/runs/two/train"))
    while (checkpoints.newest_state() or {}).get("epoch", 0) < 2:
        assert driver.poll() is None, "the driver ended before it could be killed in the middle of training"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    saved = checkpoints.newest_state()
    assert saved is not None
    assert saved["epoch"] < EPOCHS, "the training was over before the kill"

    done = medmamba(*arguments, "--store", store, cwd=tmp_path, timeout_s=500)
    assert "training resumes after epoch" in done.stderr
    facts = json.loads(done.stdout)["train"]
    assert validated(facts) == [pytest.approx(epoch, abs=1e-6) for epoch in validated(expected)]
    assert facts["digest"] == expected["digest"], "the weights differ in a bit"
