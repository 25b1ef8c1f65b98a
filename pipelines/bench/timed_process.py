"""Runs a measured loader or writer in its own process and watches its memory."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import psutil

from pipelines.bench.work import received, summarize

# Modules whose `main` is run. They are imported instead of run with -m, because functions sent to Ray's workers must
# not belong to __main__.
LOADING, CONVERSION, FEED = "pipelines.bench.loading", "pipelines.bench.conversion", "pipelines.bench.feed"
_LOOK_EVERY_S = 1.0  # reading the memory of many processes slows the measured ones
_ENDS_IN_S = 20


class TimedProcess:
    """A loader or writer in its own process, and the peak memory of the process and its children."""

    def __init__(self, name: str, folder: str, *, module: str = LOADING) -> None:
        self.name, self.why_not, self.peak_bytes = name, "", 0
        self.first: dict[str, Any] = {}
        self.epochs: list[dict[str, float]] = []
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import main; main()", name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self._watching = True
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def wait(self) -> None:
        """Waits until its workers have started and its first epoch (or its output) was checked."""
        self.first = self._receive()
        self.why_not = self.why_not or self.first["why_not"]

    def epoch(self) -> None:
        """Times the next epoch, unless it has failed."""
        if not self.why_not:
            assert self._process.stdin is not None
            print("next", file=self._process.stdin, flush=True)
            values = self._receive()
            if not self.why_not:
                self.epochs.append(values)

    def end(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._watching = False
        self._watch.join()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_ENDS_IN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def figures(self) -> dict[str, Any]:
        """Its figures, or `why_not`."""
        if self.why_not:
            return {"why_not": self.why_not}
        return {**summarize(self.epochs), "peak_gib": self.peak_bytes / 2**30}

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (values := received(line)) is not None:
                return values
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines() or ["no message"]
        last = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])
        self.why_not = f"exited with code {self._process.wait()}: {last}"
        return {"why_not": self.why_not}

    def _look(self) -> None:
        while self._watching:
            self.peak_bytes = max(self.peak_bytes, _memory_bytes(self._process.pid))
            time.sleep(_LOOK_EVERY_S)


def _memory_bytes(pid: int) -> int:
    """Memory of a process and its descendants; shared memory counts once (PSS)."""
    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += int(getattr(memory, "pss", memory.rss))
    return total
