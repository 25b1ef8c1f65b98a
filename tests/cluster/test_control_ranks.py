"""Ranks that are asked to write a checkpoint or to stop do so at the same step."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

from pipelines.cluster.monitor import PREEMPTED

RANK = Path(__file__).parent / "control_rank.py"


@pytest.mark.parametrize("lag", [1, 4])
def test_three_ranks_get_the_same_answers_at_the_same_steps(lag):
    found = run_ranks(RANK, 3, str(lag))
    assert found["same"], found
    assert found["checkpoints"][:3] == [10, 20, 30]
    assert found["stop"] == [37 + lag, PREEMPTED], "rank 2 was told at step 37"
    assert found["wait_us"] < 5000
