"""What a driver started ends with it, however it ends; nothing else does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the watcher reads /proc")

# A server, its child with an overwritten environment (as Ray's dashboard has), and one that an orphan started.
DRIVER = """
import os, subprocess, sys, time
from pipelines.cluster.reaper import ended_with_driver
sleep = "import time; time.sleep(300)"
try:
    with ended_with_driver():
        parent = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', %r], env={}).pid, " \\
            "flush=True); time.sleep(300)" % sleep
        server = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
        child = server.stdout.readline().strip()
        orphan = subprocess.run(
            [sys.executable, "-c", "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', %r], "
             "stdout=-3, stderr=-3).pid)" % sleep], capture_output=True, text=True).stdout.strip()
        FAIL
finally:
    bystander = subprocess.Popen([sys.executable, "-c", sleep], stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(1.2)
    print(server.pid, child, orphan, bystander.pid, flush=True)
END
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def alive_after(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_alive, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


def drive(end: str, fail: str = "pass") -> tuple[subprocess.Popen, list[int], int]:
    """A driver, the processes that it started in the block, and one that it started after it."""
    script = DRIVER.replace("END", end).replace("FAIL", fail)
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    with driver.stdout:
        *started, bystander = map(int, driver.stdout.readline().split())
    return driver, started, bystander


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_what_a_driver_started_ends_with_it_and_bystanders_stay(sent):
    driver, started, bystander = drive("time.sleep(300)")
    try:
        assert all(map(is_alive, started))
        driver.send_signal(sent)
        driver.wait()
        assert alive_after(started, 5) == []
        assert is_alive(bystander)
    finally:
        os.kill(bystander, signal.SIGKILL)


def test_a_driver_that_ends_by_itself_leaves_nothing_either():
    driver, started, bystander = drive("")
    try:
        assert driver.wait() == 0
        assert alive_after(started, 5) == []
        assert is_alive(bystander)
    finally:
        os.kill(bystander, signal.SIGKILL)


def test_a_failing_start_takes_back_what_it_started():
    driver, started, bystander = drive("", fail="time.sleep(1.2); raise SystemExit(3)")
    try:
        assert alive_after(started, 2) == []
        assert driver.wait() == 3
        assert is_alive(bystander)
    finally:
        os.kill(bystander, signal.SIGKILL)
