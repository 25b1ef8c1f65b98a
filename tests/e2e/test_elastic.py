"""A training on S3 whose second node is lost, comes back and is drained: the whole product, two real nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chain import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).parent / "elastic_run.py"


def test_a_training_loses_a_node_and_leaves_a_drained_one(s3, mlflow_server, tmp_path):
    env = environment({"MLFLOW_TRACKING_URI": mlflow_server, **{k: v for k, v in os.environ.items() if "AWS" in k}})
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), s3], env=env, cwd=tmp_path, capture_output=True, text=True,
        timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found["took_s"], indent=1))
    lines = [line for _, line in found["told"]]
    assert found["code"] == 1
    assert lines[-1] == "medmamba: interrupted; run the same command to resume"
    assert any("restart 1 of 3 before the next checkpoint" in line for line in lines)
    for reason in ("the number of workers changes", "a node will be preempted"):
        line = next(line for line in lines if reason in line)
        assert "lost 0 s (0 steps)" in line, line
    written = next(line for line in lines if "interrupted: a checkpoint of step" in line)
    assert f"step {found['saved']['step']} was written, no steps are lost" in written
    assert found["saved"]["ranks"] == 1
