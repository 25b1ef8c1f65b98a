"""Two hosts that call themselves 127.0.0.1, as network namespaces: their ranks meet over the addresses of the nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RANK = Path(__file__).parent / "meeting_rank.py"
ROOT = Path(__file__).resolve().parents[2]
# Addresses set aside for documentation: nothing else here has them.
ADDRESSES = ("192.0.2.65", "192.0.2.66")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces that are joined by a cable."""
    names = (f"mm{os.getpid()}a", f"mm{os.getpid()}b")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/30", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here ({error})")
    finally:
        for name in made:
            ip("netns", "delete", name)


def ranks(hosts: tuple[str, str], bind: str) -> list[subprocess.CompletedProcess]:
    """Both ranks to their end, each on a host whose own name resolves to 127.0.0.1."""
    running = []
    for rank, host in enumerate(hosts):
        words = [sys.executable, str(RANK), str(rank), ADDRESSES[rank], ADDRESSES[0], "29555", bind]
        inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname localhost && exec "$@"', "sh"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen([*inside, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=120) for process in running]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(running, outputs, strict=True)
    ]


def test_ranks_on_hosts_whose_name_is_loopback_meet(hosts):
    done = ranks(hosts, "bind")
    assert [(each.returncode, each.stdout.strip()) for each in done] == [(0, "3.0"), (0, "3.0")], done[0].stderr[-2000:]


@pytest.mark.slow  # gloo takes most of a minute to give up
def test_without_the_interface_of_the_node_they_would_not(hosts):
    """The test above can fail: these hosts are of the kind where gloo's own guess is wrong."""
    assert all(each.returncode != 0 for each in ranks(hosts, "guess"))
