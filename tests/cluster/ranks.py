"""Runs a script as the ranks of one training."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import free_port

WAIT_S = 300


def run_ranks(script: Path, ranks: int, *arguments: str) -> list:
    """What rank 0 of `ranks` processes with one thread each prints last, as JSON."""
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with TemporaryDirectory() as folder:
        out, errors = ([Path(folder, f"{rank}.{kind}") for rank in range(ranks)] for kind in ("out", "errors"))
        codes = _run(
            [
                {
                    "script": str(script),
                    "arguments": arguments,
                    "environment": {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    "out": str(out[rank]),
                    "errors": str(errors[rank]),
                }
                for rank in range(ranks)
            ]
        )
        failed = [path.read_text()[-3000:] for code, path in zip(codes, errors, strict=True) if code]
        assert not failed, "\n".join(failed)
        return json.loads(out[0].read_text().splitlines()[-1])


def _run(ranks: list[dict]) -> list[int]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(ranks), file=server.stdin, flush=True)
    told = server.stdout.readline() if select.select([server.stdout], [], [], WAIT_S)[0] else ""
    if not told:
        _server.cache_clear()
        _end(server)
        pytest.fail(f"the ranks did not end within {WAIT_S} s, or the process that forks them ended")
    return json.loads(told)


@functools.cache
def _server() -> subprocess.Popen:
    """The process that forks the ranks; it ends with this one, whose end of its pipe closes."""
    command = [sys.executable, str(Path(__file__).parent / "rank_server.py")]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.communicate()
