"""A training on two nodes that come and go: `elastic_run.py FOLDER STORE`; S3 and MLflow are named in the environment.

Prints as JSON what the driver told, with the seconds since it started, what was done when, and how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from chain import TINY, command

from pipelines.cluster.ray_session import DEFAULTS

os.environ.update({**DEFAULTS, "RAY_AUTH_MODE": "disabled"})
from ray.cluster_utils import Cluster

from data_shards.store import open_store
from pipelines.worker.checkpoint.stored import Checkpoints

WAIT_S = 240
OPTIONS = [
    "--run", "elastic", "--train.epochs", "2000", "--data.phantoms.num-patients", "120", "--placement.workers", "2",
    "--placement.workers-min", "1", "--placement.cpus-per-worker", "1", "--placement.checkpoint-steps", "25",
]  # fmt: skip


class Driver:
    """The command in a process of its own, and the lines that it has told."""

    def __init__(self, arguments: list[str], folder: Path, env: dict[str, str]) -> None:
        self.began = time.monotonic()
        self.told: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            command(*arguments), env=env, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def now(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.began

    def wait_for(self, text: str, since: float) -> float:
        """When a line with this text was told, from `since` on."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for at, line in list(self.told):
                if at >= since and text in line:
                    return at
            time.sleep(0.05)
        raise SystemExit(f"{text!r} was not told: {json.dumps(self.told[-40:], indent=1)}")

    def end(self) -> int:
        """Ctrl-C, and the exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(100)
        self._reader.join(5)
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append((self.now(), line.rstrip()))


def main() -> None:
    folder, store = Path(sys.argv[1]), sys.argv[2]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    driver = Driver(["train", *TINY, *OPTIONS, "--store", store], folder, env)
    took: dict[str, float] = {}

    def timed(what: str, since: float, *lines: str) -> None:
        at = since
        for line in lines:
            at = driver.wait_for(line, at)
        took[what] = round(at - since, 1)
        time.sleep(4)

    timed("start", 0.0, "train: epoch 1")
    at = driver.now()
    cluster.remove_node(other, allow_graceful=False)
    timed("node lost -> next progress", at, "starting 1 training worker on", "train: epoch")
    at = driver.now()
    other = cluster.add_node(num_cpus=1)
    timed("node added -> next progress with two", at, "the number of workers", "starting 2 training", "train: epoch")
    at = driver.now()
    drain = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address]
    drain += ["--node-id", other.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*drain, "--deadline-remaining-seconds", "60"], check=True, capture_output=True)
    timed("drain asked -> next progress with one", at, "taken away", "starting 1 training", "train: epoch")
    code = driver.end()
    found: dict[str, Any] = {"code": code, "told": driver.told, "took_s": took}
    state = Checkpoints(open_store(f"{store}/runs/elastic/train")).newest_state()
    found["saved"] = {name: state[name] for name in ("step", "ranks", "epoch")} if state else None
    print(json.dumps(found), flush=True)
    cluster.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
