"""A training that was killed once two of its checkpoints were complete, to damage and to resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chain import TINY, command, environment, medmamba

RUN = "r"
TRAIN = f"runs/{RUN}/train"


@dataclass(frozen=True)
class Interrupted:
    """The store of the training, which tests may change, and what it would have become."""

    arguments: list[str]
    store: Path
    kept: Path
    """A copy of the store as the kill left it."""
    digest: str
    """Of the weights of the same training that nobody disturbed."""

    @property
    def train(self) -> Path:
        """The folder of its step."""
        return self.store / TRAIN

    def restore(self) -> None:
        """Puts the store back to where the kill left it."""
        shutil.rmtree(self.store, ignore_errors=True)
        shutil.copytree(self.kept, self.store)

    def resume(self, *, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Gives the command again."""
        return medmamba(*self.arguments, cwd=self.store.parent, code=code, timeout_s=400)

    def is_equal(self, done: subprocess.CompletedProcess[str]) -> bool:
        """Whether a command ended with the weights of the undisturbed training."""
        return json.loads(done.stdout)["train"]["digest"] == self.digest


def interrupt_training(folder: Path, *arguments: str, epochs: int = 5) -> Interrupted:
    """Trains once to the end, and once until two checkpoints are complete."""
    command_line = ["train", *TINY, "--train.epochs", str(epochs), "--run", RUN, "--json", *arguments]
    whole = medmamba(*command_line, "--store", str(folder / "whole"), cwd=folder, timeout_s=400)
    store = folder / "store"
    line = [*command_line, "--store", str(store)]
    checkpoints = store / TRAIN / "checkpoints"
    kill_once(line, lambda: len(list(checkpoints.glob("*/train.json"))) >= 2, cwd=folder)
    shutil.copytree(store, folder / "kept")
    assert len(list(checkpoints.glob("*/train.json"))) == 2
    assert not (store / TRAIN / "record.json").exists(), "the training was over before the kill"
    return Interrupted(line, store, folder / "kept", json.loads(whole.stdout)["train"]["digest"])


def kill_once(arguments: list[str], is_time: Callable[[], bool], *, cwd: Path) -> None:
    """Begins a command and kills it with all its processes when it is time."""
    log = cwd / "killed.log"
    with log.open("wb") as told:
        driver = subprocess.Popen(command(*arguments), env=environment(), cwd=cwd, stdout=told, stderr=told)
    deadline = time.monotonic() + 400
    while not is_time():
        assert driver.poll() is None, f"the command ended before it could be killed:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
