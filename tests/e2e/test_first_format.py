"""A training that was interrupted when checkpoints had their first format: the command resumes it exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interrupted_training import RUN, interrupt_training

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SCRIPT = Path(__file__).with_name("first_format_rank.py")


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 1), (2, 3)], ids=["alone", "zero1", "zero3"])
def test_an_interrupted_first_format_training_keeps_its_weights(tmp_path, ranks, zero_stage):
    placement = ["--placement.workers", str(ranks), "--placement.zero-stage", str(zero_stage)]
    training = interrupt_training(tmp_path, *placement)
    begun = run_ranks(SCRIPT, ranks, str(training.store), RUN, str(zero_stage))
    assert not (training.train / "checkpoints").exists()
    done = training.resume()
    assert f"training resumes after epoch {begun['epoch']}" in done.stderr
    assert training.is_equal(done)
