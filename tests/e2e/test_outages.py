"""A training by the command line while a real MLflow server or a real S3 store is away, for a while and for good."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from absent_server import AbsentServer, absent_server
from chain import TINY, command, environment, medmamba
from conftest import free_port, service
from mlflow import MlflowClient

EPOCHS, SECONDS = 12, 12  # epochs of a training, which takes less than a second for each; and of an outage
LONG = pytest.param(150, 60, marks=pytest.mark.slow)  # which is over before the training is


def train(epochs: int = EPOCHS) -> list[str]:
    """The command line of a training."""
    return ["train", *TINY, "--train.epochs", str(epochs), "--run", "night"]


class KilledServer:
    """An MLflow server with SQLite behind it that can be killed and started again at its address."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self._running = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        binaries = Path(sys.executable).parent
        arguments = [
            str(binaries / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination", str(self._folder / "artifacts"), "--serve-artifacts",
        ]  # fmt: skip
        env = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
        env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        log = self._folder / "server.log"
        running = service(arguments, url=f"{self.address}/health", env=env, log=log, wait_s=120)
        self._process = self._running.enter_context(running)

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it."""
        self._running.close()


@pytest.fixture
def mlflow(tmp_path) -> Iterator[KilledServer]:
    """A server of the test's own."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    server = KilledServer(folder)
    yield server
    server.close()


@pytest.fixture
def s3_away(s3_server, s3) -> Iterator[tuple[AbsentServer, str, dict[str, str]]]:
    """(the S3 server, which can be away; a store on it; the variables that lead to it)."""
    with absent_server(s3_server.endpoint) as proxy:
        yield proxy, s3, {**s3_server.env, "AWS_ENDPOINT_URL_S3": proxy.address}


class Training:
    """A command that runs; its terminal is read while it does."""

    def __init__(self, arguments: list[str], *, env: dict[str, str], folder: Path) -> None:
        self._log = folder / "terminal.log"
        self._began = time.monotonic()
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                command(*arguments), env=environment(env), cwd=folder, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def terminal(self) -> str:
        """What it has said so far."""
        return self._log.read_text()

    def wait_for(self, text: str, *, within_s: float = 200) -> None:
        """Until the terminal shows it."""
        self._wait(lambda: text in self.terminal, within_s, f"never said {text!r}")

    def end(self, *, within_s: float = 300) -> int:
        """Its exit code."""
        self._wait(lambda: self._process.poll() is not None, within_s, "did not end")
        return self._process.returncode

    def _wait(self, is_over: Callable[[], bool], within_s: float, complaint: str) -> None:
        until = time.monotonic() + within_s
        while not is_over():
            if time.monotonic() > until or (self._process.poll() is not None and not is_over()):
                self._process.kill()
                pytest.fail(f"{complaint}:\n{self.terminal[-4000:]}")
            time.sleep(0.05)


def curve(address: str, name: str) -> list[int]:
    """The steps at which the training's run has points of a metric."""
    client = MlflowClient(address)
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.`medmamba.step` = 'train'")
    assert run.info.status == "FINISHED"
    return [point.step for point in client.get_metric_history(run.info.run_id, name)]


@pytest.mark.parametrize(("epochs", "away_s"), [(EPOCHS, SECONDS), LONG])
def test_mlflow_killed_amid_a_training_gets_every_metric_once(mlflow, tmp_path, epochs, away_s):
    arguments = [*train(epochs), "--store", str(tmp_path / "store")]
    training = Training(arguments, env={"MLFLOW_TRACKING_URI": mlflow.address}, folder=tmp_path)
    training.wait_for("epoch 1  loss")
    mlflow.kill()
    time.sleep(away_s)
    mlflow.start()
    assert training.end() == 0, training.terminal
    assert len(re.findall("has not answered since", training.terminal)) == 1, training.terminal
    assert len(re.findall("answers again after", training.terminal)) == 1, training.terminal
    assert curve(mlflow.address, "train_loss") == list(range(1, epochs + 1))
    steps = curve(mlflow.address, "step_loss")
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) % epochs == 0


@pytest.mark.slow
def test_absent_mlflow_ends_a_training_and_a_resume_sends_more(mlflow, tmp_path):
    arguments = [*train(), "--store", str(tmp_path / "store")]
    env = {"MLFLOW_TRACKING_URI": mlflow.address}
    training = Training([*arguments, "--placement.patience-s", "15"], env=env, folder=tmp_path)
    training.wait_for("epoch 1  loss")
    mlflow.kill()
    began = time.monotonic()
    assert training.end() == 1
    assert time.monotonic() - began < 90
    assert "longer than 15 s (--placement.patience-s): start it, then run the same command" in training.terminal
    mlflow.start()
    medmamba(*arguments, env=env, cwd=tmp_path)
    assert curve(mlflow.address, "train_loss") == list(range(1, EPOCHS + 1))
    steps = curve(mlflow.address, "step_loss")
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("silent", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["refuses", "is silent"])
@pytest.mark.parametrize(("epochs", "away_s"), [(EPOCHS, SECONDS), LONG])
def test_a_store_that_is_away_at_a_checkpoint_is_waited_for(s3_away, mlflow, tmp_path, epochs, away_s, silent):
    server, store, env = s3_away
    env = {**env, "MLFLOW_TRACKING_URI": mlflow.address}
    training = Training([*train(epochs), "--store", store], env=env, folder=tmp_path)
    training.wait_for("epoch 1  loss")
    server.leave(silent=silent)
    time.sleep(away_s)
    server.come_back()
    assert training.end() == 0, training.terminal
    assert len(re.findall("the store .* has not answered since", training.terminal)) <= 1, training.terminal
    assert curve(mlflow.address, "train_loss") == list(range(1, epochs + 1))


@pytest.mark.slow
def test_a_store_gone_for_good_ends_the_training_and_it_resumes(s3_away, mlflow, tmp_path):
    server, store, env = s3_away
    env = {**env, "MLFLOW_TRACKING_URI": mlflow.address}
    training = Training([*train(), "--store", store, "--placement.patience-s", "15"], env=env, folder=tmp_path)
    training.wait_for("epoch 2  loss")
    server.leave()
    began = time.monotonic()
    assert training.end() == 1
    assert time.monotonic() - began < 120
    last = training.terminal.splitlines()[-1]
    assert "S3 server cannot be reached" in training.terminal
    assert "run the same command to resume" in last, training.terminal
    server.come_back()
    done = medmamba(*train(), "--store", store, env=env, cwd=tmp_path)
    assert "training resumes" in done.stderr
    assert curve(mlflow.address, "train_loss") == list(range(1, EPOCHS + 1))


@pytest.mark.slow
def test_a_full_disk_ends_the_training_by_name_and_it_resumes(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        arguments = [*train(), "--store", str(disk / "store")]
        training = Training(arguments, env={}, folder=tmp_path)
        training.wait_for("epoch 1  loss")
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"x" * (1 << 16))
                file.flush()
        began = time.monotonic()
        assert training.end() == 1
        assert time.monotonic() - began < 60
        assert f"the disk of {disk}" in training.terminal, training.terminal
        assert "full" in training.terminal.splitlines()[-1]
        filler.unlink()
        medmamba(*arguments, cwd=tmp_path)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_sweep_with_a_killed_mlflow_logs_every_epoch_once(mlflow, tmp_path):
    arguments = ["tune", *TINY, "--tune.epochs", "6", "--run", "night", "--store", str(tmp_path / "store"), "--json"]
    training = Training(arguments, env={"MLFLOW_TRACKING_URI": mlflow.address}, folder=tmp_path)
    training.wait_for(": epoch 1  loss")
    mlflow.kill()
    time.sleep(SECONDS)
    mlflow.start()
    assert training.end() == 0, training.terminal
    client = MlflowClient(mlflow.address)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    trials = [run for run in runs if "medmamba.trial" in run.data.tags]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(trials) == 2
    for run in trials:
        epochs = [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")]
        assert epochs == list(range(1, len(epochs) + 1))
        assert len(epochs) >= 1
    assert max(len(client.get_metric_history(run.info.run_id, "train_loss")) for run in trials) == 6
