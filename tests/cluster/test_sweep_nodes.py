"""A sweep whose trials run on two nodes: the second one cannot see the folder that Tune has on the driver's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ray_cluster

from data_shards.store import open_store

SWEEP = Path(__file__).parent / "cheap_sweep.py"
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-only"}
TRIALS, EPOCHS = 6, 4


@contextlib.contextmanager
def second_node(address: str, hidden: Path, env: dict[str, str], log: Path) -> Iterator[None]:
    """Another node of the Ray at `address`, which sees an empty folder that nobody can write to at `hidden`."""
    ray = Path(sys.executable).parent / "ray"
    start = f"mount -t tmpfs -o ro none {hidden} && exec {ray} start --address={address} --num-cpus=1 --block"
    with log.open("wb") as out:
        node = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", start], env={**os.environ, **env}, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGTERM)
        node.wait(timeout=30)


@pytest.mark.slow
def test_trials_on_another_node_need_no_access_to_tunes_folder(tmp_path, s3_server, s3):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a folder can be hidden from a process by root alone")
    hidden = tmp_path / "scratch"
    hidden.mkdir()
    (tmp_path / "waits-for-two-nodes").touch()  # else one process may run all trials before another has started
    env = {**AUTH, **s3_server.env, "PYTHONPATH": str(SWEEP.parents[2]), "RAY_TMPDIR": "/tmp"}
    with ray_cluster(env, log=tmp_path / "head.log", resources=("--num-cpus=1",)) as head:
        env = {**env, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        with second_node(head.address, hidden, env, tmp_path / "node.log"):
            done = subprocess.run(
                [sys.executable, str(SWEEP), s3, str(TRIALS), str(EPOCHS), "2", "0.3"], cwd=tmp_path,
                env={**os.environ, **env, "RAY_ADDRESS": head.address, "TMPDIR": str(hidden)},
                capture_output=True, text=True, timeout=200,
            )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records, out = json.loads(done.stdout.splitlines()[-1]), open_store(s3)
    assert [record["number"] for record in records] == list(range(1, TRIALS + 1))
    assert {record["state"] for record in records} <= {"ended", "stopped"}
    assert len({out.get(f"trials/{record['id']}/node") for record in records}) == 2
    assert list(hidden.iterdir()) == []
