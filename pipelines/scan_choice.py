"""Which backend of the scan runs on this machine, found out by a process of its own while Ray starts.

Importing torch and building or loading a backend takes 2 to 5 s; and on a GPU it takes memory, which the driver must
not hold. This file runs as that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

OURS = str(Path(__file__).resolve().parents[1])  # where the three packages are


class ScanChoice:
    """The backend that `name` stands for on `device` of this machine; begun when made, asked for once."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        paths = os.pathsep.join(filter(None, (OURS, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), name, device],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a Ctrl-C ends it too, and Python would print where
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def result(self) -> str | None:
        """The backend; ValueError where the named one cannot run here, None where the process failed."""
        told, _ = self._process.communicate()
        if self._process.returncode:
            return None
        chosen = json.loads(told.splitlines()[-1])
        if "error" in chosen:
            raise ValueError(chosen["error"])
        return chosen["backend"]


def _choose(name: str, device: str) -> dict[str, str]:
    from medmamba.ops.ss2d_scan import resolve_backend

    try:
        return {"backend": resolve_backend(name, device)}
    except ValueError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    print(json.dumps(_choose(sys.argv[1], sys.argv[2])))
