"""Which backend of the scan runs on this machine, found out by a process of its own while Ray starts.

Importing torch and building or loading a backend takes 2 to 5 s; and on a GPU it takes memory, which the driver must
not hold. Once it has named the backend, the process builds what the network to be trained needs of it, 1 s for each
stage, while workers start. This file runs as that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

OURS = str(Path(__file__).resolve().parents[2])  # where the three packages are


class ScanChoice:
    """The backend that `name` stands for on `device` of this machine; begun when made, asked for once.

    `sizes` are those of the scans of a network that will be trained (MedMambaConfig.scan_sizes), in these `dtypes`.
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
            stderr=subprocess.DEVNULL,  # a Ctrl-C ends it too, and Python would print where
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def result(self) -> str | None:
        """The backend; ValueError where the named one cannot run here, None where the process failed."""
        assert self._process.stdout is not None
        told = self._process.stdout.readline()
        threading.Thread(target=self._process.communicate, daemon=True).start()  # it may be building for a while yet
        if not told.endswith("\n"):
            return None
        chosen = json.loads(told)
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
