"""The Ray that a command works on: what it has, what runs on it, what it is told."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import time

import pytest

from medmamba.ops.ss2d_scan import resolve_backend
from pipelines.cluster.ray_session import SERVERS, _not_started, connect
from pipelines.cluster.reaper import Process, _processes

SESSION = """
import contextlib, os, sys
from data_shards.store import open_store
from pipelines.cluster import ray_session
from pipelines.placement import PlacementConfig
ray_session.connect(num_cpus=%d)
%s
"""


def outcome(num_cpus: int, lines: str, tmp_path) -> str:
    """What a process prints that has a Ray of its own, with so many CPUs."""
    command = [sys.executable, "-c", SESSION % (num_cpus, lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_scan_backend_is_the_one_that_runs_on_a_worker(tmp_path):
    lines = """
store = open_store(".")
print(ray_session.place(PlacementConfig(), store).scan)
print(ray_session.place(PlacementConfig(scan="reference"), store).scan)
try:
    ray_session.place(PlacementConfig(scan="nosuch"), store)
except ValueError as error:
    print(error)
"""
    chosen, named, refused = outcome(2, lines, tmp_path).splitlines()
    assert (chosen, named) == (resolve_backend("auto", "cpu"), "reference")
    assert "unknown scan backend 'nosuch'" in refused


def test_a_ray_without_a_cpu_is_waited_for_aloud_and_then_named(tmp_path):
    lines = """
try:
    ray_session._nodes(print, wait_s=2)
except ValueError as error:
    print(error)
"""
    waits, gives_up = outcome(0, lines, tmp_path).splitlines()
    assert waits == "this Ray has no CPU yet; waiting up to 2 s for a worker node"
    assert "minReplicas" in gives_up


def test_a_password_never_reaches_a_runtime_environment(monkeypatch):
    with socket.socket() as ray:  # it answers, which is all that is looked at before
        ray.bind(("127.0.0.1", 0))
        ray.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{ray.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@host:5000")
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI is a URL with a user, password") as told:
            connect()
    assert "s3cret" not in str(told.value)


LIVES = """
import os, signal, time
from pipelines.cluster import ray_session
from pipelines.cluster.reaper import children

ray_session.connect(num_cpus=1, lost=lambda server: (print("lost", server, flush=True), os._exit(7)))
import ray  # it reads its settings when it is imported

@ray.remote
def here() -> int:
    return os.getpid()

ray.get(here.remote())
print("up", flush=True)
END
time.sleep(300)
"""


def descendants(pid: int) -> set[Process]:
    processes = dict(_processes())
    found = {process for process in processes if process[0] == pid}
    while more := {each for each, parent in processes.items() if parent in {p for p, _ in found}} - found:
        found |= more
    return found - {process for process in found if process[0] == pid}


def begin(end: str, tmp_path) -> subprocess.Popen:
    script = LIVES.replace("END", end)
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "up\n"
    return driver


def alive_after(processes: set[Process], seconds: float) -> set[Process]:
    deadline = time.monotonic() + seconds
    while processes & dict(_processes()).keys() and time.monotonic() < deadline:
        time.sleep(0.1)
    return processes & dict(_processes()).keys()


def test_a_killed_driver_leaves_no_process_of_its_ray(tmp_path):
    driver = begin("", tmp_path)
    started = descendants(driver.pid)
    assert len(started) > 10
    driver.kill()
    driver.wait()
    assert alive_after(started, 8) == set()


@pytest.mark.parametrize("server", ["raylet", "gcs_server"])
def test_the_end_of_an_embedded_ray_server_is_noticed_at_once(server, tmp_path):
    kill = f"[os.kill(process[0], signal.SIGKILL) for process, name in children().items() if name == {server!r}]"
    driver = begin(kill, tmp_path)
    began, started = time.monotonic(), descendants(driver.pid)
    told, _ = driver.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert told.splitlines()[-1] == f"lost {SERVERS[server]}"
    assert driver.returncode == 7
    assert alive_after(started, 8) == set()


def test_a_ray_that_does_not_start_is_one_line_with_what_to_do():
    told = _not_started(Exception("The current node timed out during startup. This could happen because\nmore\nlines"))
    assert told.startswith("Ray did not start on this machine (The current node timed out during startup.")
    assert "run the same command to resume" in told
    assert "\n" not in told
    full = _not_started(OSError(errno.ENOSPC, "No space left on device"))
    assert "Ray did not start: the disk of" in full
    assert "RAY_TMPDIR" in full
