"""A group of workers under our policies, without a network: `watched_group.py SCENARIO FOLDER`.

A worker's state is the number of its steps, in a file. Prints as JSON what the terminal would show and how the training
ended, with the seconds since what was done to it.
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

from pipelines.cluster.ray_session import DEFAULTS

os.environ.update({**DEFAULTS, "RAY_AUTH_MODE": "disabled"})
import ray
import ray.train
from ray.cluster_utils import Cluster

from pipelines.cluster.board import Watch, post
from pipelines.cluster.monitor import INTERRUPTED, RESTARTING, Limits
from pipelines.worker.group.process_group import GroupConfig
from pipelines.worker.group.trainer import LocalTrainer, WatchedTrainer

STEP_S = 0.05
STALL_S = 6.0


class Idle:
    """A writer with nothing to do."""

    is_busy = False


def work(config: dict[str, Any]) -> dict[str, Any]:
    """What each rank runs."""
    import torch
    import torch.distributed as dist

    from pipelines.worker.group.control import Control, OwnFlags, SharedFlags, Stopped
    from pipelines.worker.group.stop_flag import wants_to_stop

    place, board, saved = ray.train.get_context(), config["board"], Path(config["saved"])
    rank, ranks = place.get_world_rank(), place.get_world_size()
    step = int(saved.read_text()) if saved.exists() else 0
    union = SharedFlags() if ranks > 1 else OwnFlags()
    control = Control(rank, union, board=board, checkpoint_steps=config["every"], flag=wants_to_stop)
    try:
        with control:
            control.begin(step)
            post(board, "train", {"rank": rank, "ranks": ranks, "pid": os.getpid(), "from": step})
            while True:
                dist.all_reduce(torch.ones(1))
                time.sleep(STEP_S)
                step += 1
                if step == config.get("mistake") and rank == ranks - 1:
                    raise ValueError("train.optim.lr 9: lower it")
                wants = control.wants(step, Idle())
                if wants.checkpoint and rank == 0:
                    part = saved.with_suffix(".part")
                    part.write_text(str(step))
                    part.replace(saved)
                    control.saved(step)
                if wants.stop:
                    dist.barrier()
                    raise Stopped(wants.stop, step)
    except Stopped as stopped:
        if stopped.reason in RESTARTING:
            raise
        return {"reason": stopped.reason, "step": stopped.step}


class Training:
    """One training in a thread of this process, and what it has shown."""

    def __init__(self, folder: Path, sizes: tuple[int, ...], *, local: bool, **config: Any) -> None:
        self.shown: list[tuple[float, dict]] = []
        self.ended: dict[str, Any] = {}
        self._folder, self._sizes, self._local, self._config = folder, sizes, local, {"every": 20, **config}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for(self, groups: int, steps_s: float = 3.0) -> dict[int, int]:
        """Waits until so many groups have begun in all and the last has worked a while; returns its pids by rank."""
        deadline = time.monotonic() + 120
        while len(self.begun()) < groups and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.05)
        time.sleep(steps_s)
        return {values["rank"]: values["pid"] for _, values in self.shown if "pid" in values}  # the last of each rank

    def begun(self) -> list[tuple[float, dict]]:
        """When each group began to work, and with how many ranks."""
        return [(at, values) for at, values in self.shown if values.get("rank") == 0]

    def lines(self) -> list[str]:
        """What the user would read."""
        return [values["warning"] for _, values in self.shown if "warning" in values]

    def ask(self, stop: str) -> None:
        """What the driver does for Ctrl-C."""
        self.board.ask.remote(stop)

    def join(self, seconds: float = 120) -> None:
        """Waits for the end."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.ended = {"error": "it still runs"}

    def _run(self) -> None:
        with Watch(lambda name, values: self.shown.append((time.monotonic(), values))) as self.board:
            kind = LocalTrainer if self._local else WatchedTrainer
            trainer = kind(
                work,
                train_loop_config={**self._config, "board": self.board, "saved": str(self._folder / "saved")},
                backend_config=GroupConfig("gloo"),
                scaling_config=ray.train.ScalingConfig(num_workers=self._sizes[-1], resources_per_worker={"CPU": 1}),
                run_config=ray.train.RunConfig(storage_path=str(self._folder / "ray")),
            ).watched(self.board, sizes=self._sizes, limits=Limits(STALL_S))
            try:
                self.ended = {"result": trainer.fit().return_value}
            except Exception as error:
                self.ended = {"error": f"{type(error).__name__}: {error}"[:500]}


def on_one_machine(scenario: str, folder: Path) -> dict[str, Any]:
    """Two workers on an embedded Ray."""
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="error")
    config = {"mistake": {"mistake": 30}, "hopeless": {"every": 0}}.get(scenario, {})
    training, took = Training(folder, (2,), local=True, **config), []
    sent = signal.SIGSTOP if scenario.startswith("stalled") else signal.SIGKILL
    times = {"killed": 1, "hopeless": 4, "stalled": 1, "stalled-twice": 2}.get(scenario, 0)
    if scenario == "stalled-twice":
        training._config["every"] = 0
    for nth in range(times):
        pids = training.wait_for(nth + 1)
        at = time.monotonic()
        os.kill(pids[1], sent)
        if nth + 1 < times or scenario in ("killed", "stalled"):
            training.wait_for(nth + 2, 0.0)
            took.append(training.begun()[-1][0] - at)
    if scenario in ("killed", "stalled"):
        time.sleep(2)
        training.ask(INTERRUPTED)
    if scenario == "told":
        os.kill(training.wait_for(1)[1], signal.SIGTERM)
    training.join()
    return {"lines": training.lines(), "ended": training.ended, "took_s": took, "groups": len(training.begun())}


def on_two_nodes(folder: Path) -> dict[str, Any]:
    """One or two workers: a node is lost, comes back, and is drained."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    training, took = Training(folder, (1, 2), local=False), {}

    def timed(what: str, groups: int, at: float) -> None:
        training.wait_for(groups)
        took[what] = training.begun()[-1][0] - at

    training.wait_for(1)
    at = time.monotonic()
    cluster.remove_node(other, allow_graceful=False)
    timed("node lost -> begins again", 2, at)
    other = cluster.add_node(num_cpus=1)
    timed("node added -> begins with two", 3, time.monotonic())
    at = time.monotonic()
    drain = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address]
    drain += ["--node-id", other.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*drain, "--deadline-remaining-seconds", "30"], check=True, capture_output=True)
    timed("drained -> begins with one", 4, at)
    training.ask(INTERRUPTED)
    training.join()
    sizes = [values["ranks"] for _, values in training.begun()]
    begun = [values["from"] for _, values in training.begun()]
    return {"lines": training.lines(), "ended": training.ended, "took_s": took, "sizes": sizes, "from": begun}


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    found = on_two_nodes(folder) if scenario == "elastic" else on_one_machine(scenario, folder)
    print(json.dumps(found), flush=True)
    os._exit(0)  # what Ray's threads would say of its end is of no use


if __name__ == "__main__":
    main()
