"""An actor that runs one trial after another: each is the trial that it would be in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store

TRIALS = Path(__file__).parent / "trials.py"
COMPILED = Path(__file__).parent / "compiled_trials.py"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    out = open_store(str(tmp_path_factory.mktemp("store"))).at("datasets/phantoms/default")
    convert(DataConfig(phantoms=PhantomConfig(num_patients=30, images_per_patient=2, side=32)), out)
    return out.uri


def run_trials(dataset: str, folder: Path, *rates: float) -> dict:
    """What the last of the trials with these learning rates found."""
    command = [sys.executable, str(TRIALS), dataset, str(folder), *map(str, rates)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_trial_after_others_in_its_process_is_bit_equal(dataset, tmp_path):
    alone = run_trials(dataset, tmp_path / "alone", 1e-3)
    third = run_trials(dataset, tmp_path / "third", 4e-3, 2e-3, 1e-3)
    assert len(alone["losses"]) >= 4
    assert third["losses"] == alone["losses"]
    assert third["metrics"] == alone["metrics"]
    assert third["left"] == alone["left"], "a network of an earlier trial is still in memory"


@pytest.mark.slow
def test_each_trial_of_a_process_is_compiled():
    done = subprocess.run([sys.executable, str(COMPILED)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout.splitlines()[-1])) == 2
