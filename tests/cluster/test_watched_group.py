"""Groups of workers on a real Ray: killed, stopped, told to end, told a mistake, on nodes that come and go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "watched_group.py"
pytestmark = pytest.mark.timeout(400)


def seen(scenario: str, folder: Path) -> dict:
    """What a scenario of watched_group.py has shown."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), scenario, str(folder)], capture_output=True, text=True, timeout=360, cwd=folder
    )
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1])


def test_a_killed_worker_is_replaced_and_its_loss_is_printed(tmp_path):
    found = seen("killed", tmp_path)
    assert found["ended"]["result"]["reason"] == "interrupted"
    lost = [line for line in found["lines"] if "lost" in line]
    assert len(lost) == 1, found
    assert "worker-seconds; restart 1 of 3 before the next checkpoint" in lost[0]
    assert found["took_s"][0] < 60


def test_a_users_mistake_is_not_tried_again(tmp_path):
    found = seen("mistake", tmp_path)
    assert "train.optim.lr 9: lower it" in found["ended"]["error"]
    assert found["groups"] == 1


@pytest.mark.slow
def test_a_worker_told_to_end_stops_all_at_a_checkpoint(tmp_path):
    found = seen("told", tmp_path)
    assert found["ended"]["result"] == {"reason": "interrupted", "step": int((tmp_path / "saved").read_text())}


def test_a_stalled_rank_is_named_and_the_group_begins_again(tmp_path):
    found = seen("stalled", tmp_path)
    assert found["ended"]["result"]["reason"] == "interrupted"
    assert any("sent no heartbeat for" in line and "rank 1 (process" in line for line in found["lines"]), found
    assert found["took_s"][0] < 90


@pytest.mark.slow
def test_a_rank_that_stalls_again_is_an_error(tmp_path):
    found = seen("stalled-twice", tmp_path)
    assert "rank 1 (process" in found["ended"]["error"]
    assert "run the same command to resume" in found["ended"]["error"]
    assert found["groups"] == 2


@pytest.mark.slow
def test_workers_that_die_before_every_checkpoint_are_given_up(tmp_path):
    found = seen("hopeless", tmp_path)
    assert "error" in found["ended"]
    assert found["groups"] == 4, "the first, and three restarts"


@pytest.mark.slow
def test_a_training_shrinks_grows_back_and_leaves_a_drained_node(tmp_path):
    found = seen("elastic", tmp_path)
    assert found["sizes"] == [2, 1, 2, 1], found
    assert found["ended"]["result"]["reason"] == "interrupted"
    for reason in ("the number of workers changes", "a node will be preempted"):
        line = next(line for line in found["lines"] if reason in line)
        assert "lost 0 s (0 steps)" in line
    print(found["took_s"])
