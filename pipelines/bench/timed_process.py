"""A loader or writer that is measured in a process of its own, with the memory that it takes."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from pipelines.bench.work import summarise, told_in

# Modules whose `main` is run. They are imported, not run as a module: what Ray's workers get must not be of a module
# that is called __main__.
LOADING, CONVERSION, FEED = "pipelines.bench.loading", "pipelines.bench.conversion", "pipelines.bench.feed"
_LOOK_EVERY_S = 1.0  # reading the memory of many processes takes time from those that are measured
_ENDS_IN_S = 20


class TimedProcess:
    """A loader or writer in a process of its own, and the memory that it and its children took at most."""

    def __init__(self, name: str, folder: str, *, module: str = LOADING):
        self.name, self.why_not, self.peak_bytes = name, "", 0
        self.first: dict[str, Any] = {}
        self.epochs: list[dict[str, float]] = []
        self._complained = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import main; main()", name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complained,
            text=True,
        )
        self._watching = True
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def wait(self) -> None:
        """Until its workers have started and its first epoch (or what it wrote) was found right, or not."""
        self.first = self._told()
        self.why_not = self.why_not or self.first["why_not"]

    def epoch(self) -> None:
        """One more epoch is timed, unless it has failed."""
        if not self.why_not:
            assert self._process.stdin is not None
            print("next", file=self._process.stdin, flush=True)
            told = self._told()
            if not self.why_not:
                self.epochs.append(told)

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
        self._complained.close()

    def figures(self) -> dict[str, Any]:
        """Its row, or why it has none."""
        if self.why_not:
            return {"why_not": self.why_not}
        return {**summarise(self.epochs), "peak_gib": self.peak_bytes / 2**30}

    def _told(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (told := told_in(line)) is not None:
                return told
        self._complained.seek(0)
        said = self._complained.read().strip().splitlines() or ["nothing was said"]
        last = next((line for line in reversed(said) if re.match(r"[\w.]*(Error|Exception)\b", line)), said[-1])
        self.why_not = f"ended with {self._process.wait()}: {last}"
        return {"why_not": self.why_not}

    def _look(self) -> None:
        while self._watching:
            self.peak_bytes = max(self.peak_bytes, _memory_bytes(self._process.pid))
            time.sleep(_LOOK_EVERY_S)


def _memory_bytes(pid: int) -> int:
    """Memory of a process and all that it started; what they share is counted once (PSS)."""
    import psutil

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
        total += getattr(memory, "pss", memory.rss)
    return total
