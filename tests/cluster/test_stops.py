"""Signals to the driver of a training: the first asks for a checkpoint, the second ends at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# A real board that a training has reported to; the driver waits in Ray, as it does in `fit`.
SCRIPT = """
import json, os, signal, sys, threading, time
from pipelines.cluster.ray_session import DEFAULTS
os.environ.update(DEFAULTS)
import ray
from pipelines.cluster.board import Watch
from pipelines.interrupt import interruptible
from pipelines.cluster.monitor import Beat, Member
from pipelines.cluster import stops

scenario = sys.argv[1]
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
said, orders, ended = [], "", None

@ray.remote(num_cpus=0)
def works():
    time.sleep(30)

with Watch(lambda *post: None) as board:
    ray.get(board.begin_group.remote([Member(0, "here", 7)]))
    if scenario != "starting":
        ray.get(board.beat.remote(0, Beat(7, 3, 1)))
    if scenario == "silent":
        stops.CHECKPOINT_WAIT_S = 2.0
    until = time.monotonic() + 1 if scenario == "time" else 0.0
    driver = stops.Stops(board, said.append, until=until)

    def send():
        time.sleep(1)
        if scenario != "time":
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)
        global orders
        orders = ray.get(board.beat.remote(0, Beat(7, 3, 1))).stop
        if scenario == "twice":
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    began = time.monotonic()
    try:
        with interruptible(), driver.heeded():
            ray.get(works.remote(), timeout=12 if scenario == "time" else 30)
    except ray.exceptions.GetTimeoutError:
        ended = "waits on"
    except SystemExit as error:
        ended = error.code
    took_s = time.monotonic() - began
    try:
        driver.raise_if_ended({"reason": "time" if scenario == "time" else "interrupted", "step": 7})
    except SystemExit as error:
        code, text = error.code, str(error)
print(json.dumps({"said": said, "orders": orders, "ended": ended, "took_s": took_s, "code": code, "text": text}))
sys.stdout.flush()
os._exit(0)
"""
ENDED = (130, 1)  # inside ray.get Ray makes it 1
WRITING = "interrupted: writing a checkpoint; interrupt again to end at once"


def ended(scenario: str, folder) -> dict:
    """How a driver ends."""
    command = [sys.executable, "-c", SCRIPT, scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    found = ended("twice", tmp_path)
    assert found["said"][0] == WRITING
    assert (found["orders"], found["ended"] in ENDED) == ("interrupted", True)
    assert found["took_s"] < 6


@pytest.mark.slow
def test_a_training_that_writes_no_checkpoint_ends_all_the_same(tmp_path):
    found = ended("silent", tmp_path)
    assert found["said"][1] == "no checkpoint within 2 s: the steps after the last one are lost"
    assert found["ended"] in ENDED


def test_a_training_without_a_step_ends_at_once(tmp_path):
    found = ended("starting", tmp_path)
    assert (found["ended"] in ENDED, WRITING in found["said"]) == (True, False)
    assert found["took_s"] < 4


@pytest.mark.slow
def test_the_end_of_the_time_is_no_failure(tmp_path):
    found = ended("time", tmp_path)
    assert (found["orders"], found["ended"], found["code"]) == ("time", "waits on", 0)
    assert found["text"] == (
        "the time of --max-minutes is up: a checkpoint of step 7 was written, no steps are lost; run the same command "
        "to resume"
    )
