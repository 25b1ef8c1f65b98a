"""Ends an embedded Ray with its driver, from a process that briefly outlives a killed driver.

When a driver is killed, Ray's servers die with it, but their children (workers, agents, the dashboard's modules) only
notice after up to 70 s. The watcher finds them by a mark in their environment, and by descent from a marked process,
because the dashboard's modules overwrite theirs. So it never takes the processes of another Ray.
This file also runs as a script, and imports only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

MARK = "MEDMAMBA_RAY_OF"
POLL_S = 0.5
KILL_FOR_S = 10.0
_YOUNG_S = 5.0  # a child between fork and exec still shows its parent's environment

Process = tuple[int, int]  # pid and start time in ticks: the kernel reuses pids


@contextlib.contextmanager
def ended_with_driver() -> Iterator[None]:
    """Processes started in the block end within seconds of this process, however it ends, or of an error inside."""
    if not os.path.isdir("/proc/self"):  # not Linux: rely on Ray's own clean-up
        yield
        return
    mark = f"{os.getpid()}-{secrets.token_hex(8)}"
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C and signals to the process group are for the driver
    )
    os.environ[MARK] = mark
    try:
        yield
    except BaseException:  # including Ctrl-C
        watcher.terminate()  # what was started so far is useless
        watcher.wait()
        raise
    finally:
        del os.environ[MARK]


def watch(driver: int, mark: str) -> None:
    """Waits until `driver` is gone or this process is terminated, then kills every process with that mark.

    Returns early if all of them have ended (`ray.shutdown`).
    """
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    search = _Search(mark)
    while os.getppid() == driver and not asked:
        if search.found and not search.look():
            return
        search.look()
        time.sleep(POLL_S)
    deadline = time.monotonic() + KILL_FOR_S
    # The second pass finds processes that were just starting.
    empty = 0
    while empty < 2 and time.monotonic() < deadline:
        alive = search.look()
        empty = 0 if alive else empty + 1
        for pid, _ in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def is_alive(process: Process) -> bool:
    """Whether this process, not a later one with the same pid, is alive."""
    return process in dict(_processes())


def children() -> dict[Process, str]:
    """The children of this process, each with the name of its program (of 15 characters at most)."""
    found = {}
    for process, parent in _processes():
        if parent == os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{process[0]}/comm") as file:
                found[process] = file.read().strip()
    return found


class _Search:
    """Finds the processes with a mark."""

    def __init__(self, mark: str) -> None:
        self._entry = f"{MARK}={mark}".encode()
        self._others: set[Process] = set()
        self.found: set[Process] = set()

    def look(self) -> set[Process]:
        """Examines all processes of this machine; returns those with the mark that are alive."""
        processes = dict(_processes())
        now = set(processes)
        self.found &= now
        self._others &= now
        for process in now - self.found - self._others:
            if self._is_marked(process[0]):
                self.found.add(process)
            elif _age_s(process) > _YOUNG_S:
                self._others.add(process)
        # Also all descendants of marked processes, including those in `_others` that overwrote their environment.
        while True:
            pids = {pid for pid, _ in self.found}
            children = {process for process, parent in processes.items() if parent in pids} - self.found
            if not children:
                return self.found
            self.found |= children

    def _is_marked(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return self._entry in file.read().split(b"\0")
        except OSError:  # gone, or another user's
            return False


def _processes() -> Iterator[tuple[Process, int]]:
    """Yields ((pid, start time), parent pid) of every process that is not a zombie; nothing if not on Linux."""
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:  # ended in the meantime
                continue
            if fields[0] not in (b"Z", b"X"):
                yield (int(name), int(fields[19])), int(fields[1])


def _age_s(process: Process) -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process[1] / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
