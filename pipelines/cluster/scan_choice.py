"""Finds the scan backend for this machine in a separate process while Ray starts.

Importing torch and building or loading a backend takes 2 to 5 s, and memory of the GPU, which the driver must not hold.
After it has reported the backend, the process builds what the network to be trained needs of it, 1 s per stage, while
workers start. This file runs as that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

OURS = str(Path(__file__).resolve().parents[2])  # the folder of the three packages


class ScanChoice:
    """The search for the backend `name` on `device` of this machine; starts at once, `result` is called once.

    `sizes` and `dtypes` are those of the scans of the network to be trained (MedMambaConfig.scan_sizes).
    """

    def __init__(
        self, name: str, device: str, sizes: Sequence[tuple[int, int, int]] = (), dtypes: Sequence[str] = ()
    ) -> None:
        self.name, self.device = name, device
        paths = os.pathsep.join(filter(None, (OURS, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), name, device, json.dumps([sizes, dtypes])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Ctrl-C ends it too, and Python would print a traceback
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def result(self) -> str | None:
        """The name of the backend; ValueError if the requested one cannot run here, None if the process failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        threading.Thread(target=self._process.communicate, daemon=True).start()  # it may still be building
        if not line.endswith("\n"):
            return None
        chosen = json.loads(line)
        if "error" in chosen:
            raise ValueError(chosen["error"])
        return chosen["backend"]


def _choose(name: str, device: str) -> dict[str, str]:
    from medmamba.ops.ss2d_scan import resolve_backend

    try:
        return {"backend": resolve_backend(name, device)}
    except ValueError as error:
        return {"error": str(error)}


def _build_ahead(backend: str, sizes: Sequence[tuple[int, int, int]], dtypes: Sequence[str]) -> None:
    import torch

    from medmamba.ops.ss2d_scan import build_ahead

    for dtype in dtypes:
        build_ahead(backend, sizes, getattr(torch, dtype))


if __name__ == "__main__":
    found = _choose(sys.argv[1], sys.argv[2])
    print(json.dumps(found), flush=True)
    if "backend" in found:
        _build_ahead(found["backend"], *json.loads(sys.argv[3]))
