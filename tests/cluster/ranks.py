"""Runs a script as the ranks of one training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import free_port


def run_ranks(script: Path, ranks: int, *arguments: str) -> list:
    """What rank 0 of `ranks` processes with one thread each prints last, as JSON."""
    port = free_port()
    workers = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, str(script), *arguments]
        workers.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    printed = [worker.communicate(timeout=300) for worker in workers]
    failed = [told[-3000:] for worker, (_, told) in zip(workers, printed, strict=True) if worker.returncode]
    assert not failed, "\n".join(failed)
    return json.loads(printed[0][0].splitlines()[-1])
