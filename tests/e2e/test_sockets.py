"""What listens while quickstart runs on a Ray of its own: loopback only, and nothing that SECURITY.md does not name."""

from __future__ import annotations

import ipaddress
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from chain import TINY, command, environment

SECURITY = (Path(__file__).resolve().parents[2] / "SECURITY.md").read_text()
# What a process is called in SECURITY.md -> what its name and command line hold. The first that fits counts.
KINDS = {
    "gcs_server": r"^gcs_server ",
    "raylet": r"^raylet ",
    "agent": r"ray::DashboardAgent|dashboard/agent\.py",
    "runtime_env_agent": r"ray::RuntimeEnvAgent|runtime_env/agent",
    "autoscaler": r"autoscaler/\S*monitor\.py",
    "dashboard": r"dashboard/dashboard\.py|ray-dashboard",
    "training": r"ray::(RayTrainWorker|ImplicitFunc|execute\._join)",
    "worker": r"ray::|default_worker\.py",
    "driver": r"-m pipelines",
}


def kind_of(process: psutil.Process) -> str:
    line = " ".join([process.name(), *process.cmdline()])
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, line)), line[:100])


def listening(process: psutil.Process) -> set[tuple[str, str]]:
    """(kind, address) of everything that the process or a descendant listens on just now."""
    found = set()
    for each in [process, *process.children(recursive=True)]:
        try:
            sockets = [it for it in each.net_connections(kind="inet") if it.status == psutil.CONN_LISTEN]
            found |= {(kind_of(each), it.laddr.ip) for it in sockets}
        except psutil.Error:
            continue  # it has just ended
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


@pytest.mark.slow
def test_quickstart_listens_on_loopback_only_as_security_md_says(tmp_path):
    words = ["quickstart", "--until", "train", "--placement.workers", "2", *TINY, "--train.epochs", "1"]
    words += ["--tune.trials", "1", "--store", str(tmp_path / "store")]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            command(*words), env=environment(), cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
        )
    found: set[tuple[str, str]] = set()
    while driver.poll() is None:
        try:
            found |= listening(psutil.Process(driver.pid))
        except psutil.Error:
            break
        time.sleep(0.4)
    assert driver.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    assert {(kind, address) for kind, address in found if not is_loopback(address)} == set()
    named = set(re.findall(r"^\| `(\w+)` \|", SECURITY, re.MULTILINE))
    seen = {kind for kind, _ in found}
    assert seen <= named
    assert {"driver", "gcs_server", "raylet", "worker", "dashboard", "agent", "training"} <= seen, "nothing was watched"
    assert named <= set(KINDS)
