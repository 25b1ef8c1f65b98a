"""Kills in the middle of trainings, and whether the same command then ends with the same weights.

    python tests/cluster/training_kills.py --stages 0 1 2 3 --store s3 --json kills.json

A training with two workers on CPUs is killed (SIGKILL) in a phase, resumed by the same command, killed in the next
phase, and so on; in the end its weights are compared with those of a training that nobody disturbed. There is one such
training for each ZeRO stage: a single kill is a chain of one (`--cases zero1-worker-epoch`). A line for each kill: the
exit code of the command, seconds from the kill to the next step, and steps made again. Exits with 1 where weights
differ, MLflow lacks an epoch or has one twice, or a training does not end. The phases are seen through
tests/cluster/marked/sitecustomize.py; the product knows nothing of it.

killed: `worker` one rank (the one that writes, where a checkpoint is written), `driver` the command's own process,
`node` Ray's raylet, `all` every process of the command at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "e2e")]

from chain import TINY, command, environment
from conftest import free_port, service

WHO = ("driver", "node", "all", "worker")
# Phase -> its mark, and how often a rank comes there, since it began, before it is killed: an epoch ends meanwhile.
PHASES = {
    "start": ("begin", 1),
    "epoch": ("third-step", 2),
    "checkpoint": ("writing", 2),
    "validation": ("validating", 2),
}
OUTLASTS_S = 300.0  # a command that runs longer hangs
MOST_TRIES = 4


@dataclass(frozen=True)
class Place:
    """Where trainings are kept: the store, and what the environment must hold for it."""

    store: str
    env: dict[str, str]


@dataclass(frozen=True)
class Case:
    """One kill."""

    stage: int
    who: str
    phase: str

    @property
    def name(self) -> str:
        """A name for its run."""
        return f"zero{self.stage}-{self.who}-{self.phase}"


EVERY_CASE = tuple(Case(*each) for each in itertools.product(range(4), WHO, PHASES))


@dataclass
class Outcome:
    """What a kill led to."""

    stage: int
    who: str
    phase: str
    code: int | None = None
    """Of the command that was killed; None where it went on by itself."""
    was_in_phase: bool = False
    """Whether the process of the mark had come to no later one when it was killed."""
    next_step_s: float | None = None
    """From the kill to the next step of a new process."""
    steps_again: int = 0
    """Steps that rank 0 had made before, and made again."""
    told: str = ""
    """The last line of the command that was killed."""


@dataclass
class Ending:
    """How a training ended that was killed."""

    stage: int
    code: int
    is_equal: bool = False
    """Whether the weights are those of the undisturbed training."""
    is_logged: bool = False
    """Whether MLflow's run is finished and has each epoch once."""
    told: str = ""
    """What the last command printed, where it failed."""

    @property
    def is_good(self) -> bool:
        """Whether it ended as the undisturbed one did."""
        return self.code == 0 and self.is_equal and self.is_logged


@dataclass(frozen=True)
class Mark:
    """A rank came to a phase."""

    at: float
    pid: int
    rank: int
    name: str

    @property
    def step(self) -> tuple[int, ...]:
        """(epoch, step of it) where a step was made; else nothing."""
        return tuple(map(int, self.name.split("-")[1:])) if self.name.startswith("step-") else ()


class Training:
    """One training, seen from outside; its command is given again and again."""

    def __init__(self, folder: Path, place: Place, stage: int, epochs: int, *more: str) -> None:
        self._folder, self._marks, self._tries = folder, folder / "marks", 0
        self._process: subprocess.Popen | None = None
        folder.mkdir(parents=True)
        self._arguments = [
            "train", *TINY, "--train.epochs", str(epochs), "--run", folder.name, "--json", "--store", place.store,
            "--placement.workers", "2", "--placement.zero-stage", str(stage), *more,
        ]  # fmt: skip
        path = os.pathsep.join([str(HERE / "marked"), str(HERE.parents[1])])
        self._env = environment({**place.env, "MEDMAMBA_TEST_MARKS": str(self._marks), "PYTHONPATH": path})

    @property
    def code(self) -> int | None:
        """The exit code of the last command; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def is_begun(self) -> bool:
        """Whether a command was given and has not ended."""
        return self._process is not None and self.code is None

    @property
    def pid(self) -> int:
        """The process of the last command."""
        assert self._process is not None
        return self._process.pid

    def ensure_running(self) -> None:
        """Gives the command, for the first time or again, unless it runs."""
        if self.is_begun:
            return
        self._tries += 1
        with self._out().open("wb") as out, self._err().open("wb") as err:
            self._process = subprocess.Popen(
                command(*self._arguments), env=self._env, stdout=out, stderr=err, start_new_session=True
            )

    def finish(self) -> int:
        """Waits for the end of the last command and returns its exit code; AssertionError where it hangs."""
        assert self._process is not None
        try:
            return self._process.wait(OUTLASTS_S)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the command did not end within {OUTLASTS_S:g} s: {self.told()[-2000:]}") from None

    def end(self) -> None:
        """Ends everything that still runs of the last command."""
        if self._process is not None and self.is_begun:
            kill(family(self.pid))
            self._process.wait()

    def pause_at(self, mark: str) -> None:
        """Has processes stay at this mark for a moment, from now on."""
        self._marks.with_suffix(".pause").write_text(mark)

    def facts(self) -> dict[str, Any]:
        """What the last command printed of the training, which has ended."""
        return json.loads(self._out().read_text())["train"]

    def told(self) -> str:
        """What the last command printed for the user."""
        return self._err().read_text(errors="replace")

    def marks(self) -> list[Mark]:
        """All so far."""
        lines = self._marks.read_text().splitlines() if self._marks.exists() else []
        fields = [line.split() for line in lines]
        return [Mark(float(at), int(pid), int(rank), name) for at, pid, rank, name in fields]

    def wait_for(self, name: str, count: int, rank: int, since: float) -> int:
        """Waits until a process that began after `since` has come to a mark so often as this rank; returns it."""
        deadline = time.monotonic() + OUTLASTS_S
        while True:
            ended = self.code is not None  # asked first: what it did last is seen below
            marks = self.marks()
            old = {mark.pid for mark in marks if mark.at <= since}
            pids = [mark.pid for mark in marks if mark.pid not in old and (mark.name, mark.rank) == (name, rank)]
            if len(pids) >= count:
                return pids[count - 1]
            assert not ended, f"the command ended before {name}: {self.told()[-2000:]}"
            assert time.monotonic() < deadline, f"no {name} within {OUTLASTS_S:g} s: {self.told()[-2000:]}"
            time.sleep(0.01)

    def _out(self) -> Path:
        return self._folder / f"{self._tries}.json"

    def _err(self) -> Path:
        return self._folder / f"{self._tries}.log"


def family(driver: int) -> list[psutil.Process]:
    """The process and all that it started; nothing where it has ended."""
    try:
        process = psutil.Process(driver)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kills them all at once: none sees the end of another."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def victims(who: str, driver: int, worker: int) -> list[psutil.Process]:
    """The processes that a kill of `who` ends."""
    if who == "worker":
        return [psutil.Process(worker)]
    if who == "driver":
        return [psutil.Process(driver)]
    everyone = family(driver)
    return everyone if who == "all" else [each for each in everyone if each.name() == "raylet"]


def epochs_of(cases: Sequence[Case]) -> int:
    """Epochs of a training that is killed so often: it comes up to two further between two kills."""
    return 2 * len(cases) + 1


def run_undisturbed(folder: Path, place: Place, stage: int, epochs: int, *more: str) -> str:
    """The digest of a training that nobody disturbs; an earlier call's, where the folder has it."""
    known = folder / f"whole-zero{stage}-{epochs}.digest"
    if not known.exists():
        training = Training(folder / f"whole-zero{stage}-{epochs}", place, stage, epochs, *more)
        training.ensure_running()
        assert training.finish() == 0, training.told()[-3000:]
        known.write_text(training.facts()["digest"])
    return known.read_text()


def run_chain(folder: Path, place: Place, cases: Sequence[Case], *more: str) -> Iterator[Outcome | Ending]:
    """Kills one training in each case, all of one ZeRO stage, and brings it to its end: the outcomes, then the ending.

    AssertionError where it hangs, or ends by itself before it could be killed.
    """
    stage, epochs = cases[0].stage, epochs_of(cases)
    digest = run_undisturbed(folder, place, stage, epochs, *more)
    training = Training(folder / f"killed-zero{stage}-{epochs}", place, stage, epochs, *more)
    killed_at = 0.0
    try:
        for case in cases:
            outcome, killed_at = _kill_once(training, case, killed_at)
            yield outcome
        code = _bring_to_end(training)
    finally:
        training.end()
    ending = Ending(stage, code, told="" if code == 0 else training.told()[-2000:])
    if code == 0:
        facts = training.facts()
        ending.is_equal = facts["digest"] == digest
        ending.is_logged = _is_logged(place, facts["mlflow_run"], epochs)
    yield ending


def _kill_once(training: Training, case: Case, since: float) -> tuple[Outcome, float]:
    """Kills in this phase of what began after `since`, and waits for the next step; also when the kill was."""
    mark, count = PHASES[case.phase]
    rank = 0 if case.phase == "checkpoint" else case.stage % 2  # only rank 0 writes
    if case.phase == "start" and training.is_begun:  # it has begun already
        training.end()
        since = time.time()
    training.pause_at(mark)
    training.ensure_running()
    worker = training.wait_for(mark, count, rank, since)
    killed = victims(case.who, training.pid, worker)
    assert killed, f"there is no {case.who} to kill"
    killed_at = time.time()
    kill(killed)
    marks = training.marks()
    last = [each for each in marks if each.pid == worker][-1]
    outcome = Outcome(case.stage, case.who, case.phase, was_in_phase=last.name == mark)
    made = [each.step for each in _steps_after(marks, since) if each.rank == 0]
    outcome.code, outcome.told = _see_next_step(training, killed_at)
    first = _steps_after(training.marks(), killed_at)[0]
    outcome.next_step_s = round(first.at - killed_at, 1)
    outcome.steps_again = sum(step >= first.step for step in made)
    return outcome, killed_at


def _see_next_step(training: Training, killed_at: float) -> tuple[int | None, str]:
    """Waits for a step of a new process; gives the command again, once, where it ended with the kill.

    Returns its exit code and last line, or None where it went on by itself.
    """
    code, told, deadline = None, "", time.monotonic() + OUTLASTS_S
    while not _steps_after(training.marks(), killed_at):
        assert time.monotonic() < deadline, f"no step within {OUTLASTS_S:g} s: {training.told()[-2000:]}"
        if training.code is not None:
            assert code is None, f"the command ended a second time: {training.told()[-2000:]}"
            code, told = training.code, _last_line(training.told())
            training.ensure_running()
        time.sleep(0.02)
    return code, told


def _steps_after(marks: Sequence[Mark], kill_at: float) -> list[Mark]:
    """The steps of processes that began after a kill."""
    before = {mark.pid for mark in marks if mark.at <= kill_at}
    return [mark for mark in marks if mark.pid not in before and mark.step]


def _bring_to_end(training: Training) -> int:
    """The exit code of the last command: 0, or that of the last of some tries."""
    for _ in range(MOST_TRIES):
        training.ensure_running()
        if (code := training.finish()) == 0:
            break
    return code


def _is_logged(place: Place, run: str, epochs: int) -> bool:
    from mlflow import MlflowClient

    client = MlflowClient(place.env.get("MLFLOW_TRACKING_URI", f"sqlite:///{place.store}/mlflow.db"))
    logged = [point.step for point in client.get_metric_history(run, "train_loss")]
    return client.get_run(run).info.status == "FINISHED" and sorted(logged) == list(range(1, epochs + 1))


def _last_line(told: str) -> str:
    lines = [line for line in told.splitlines() if line.strip() and not line.startswith("details:")]
    return lines[-1][:300] if lines else ""


HEADER = f"{'ZeRO':>4}  {'killed':<7} {'in':<11} {'code':>5} {'next step, s':>12} {'steps again':>11}"


def shown(found: Outcome | Ending) -> str:
    """A line of the table."""
    if isinstance(found, Ending):
        weights = "equal" if found.is_equal else "DIFFERENT"
        logged = "complete" if found.is_logged else "INCOMPLETE"
        return f"{found.stage:>4}  ended with {found.code}: weights {weights}, MLflow {logged} {found.told}"
    missed = "" if found.was_in_phase else "  (it had left the phase)"
    code = "-" if found.code is None else found.code
    return (
        f"{found.stage:>4}  {found.who:<7} {found.phase:<11} {code:>5} {found.next_step_s:>12.1f} "
        f"{found.steps_again:>11}{missed}"
    )


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[Place]:
    """A store in a folder, with MLflow's file in it."""
    yield Place(str(folder / "store"), {})


@contextlib.contextmanager
def on_s3(folder: Path) -> Iterator[Place]:
    """A store on an S3 server of its own, and an MLflow server."""
    binaries = Path(sys.executable).parent
    endpoint, address = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    moto = [str(binaries / "moto_server"), "-H", "127.0.0.1", "-p", endpoint.rpartition(":")[2]]
    mlflow = [str(binaries / "mlflow"), "server", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    mlflow += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    mlflow += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    env = {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    env |= {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(service(moto, url=endpoint, log=folder / "moto.log"))
        stack.enter_context(service(mlflow, url=f"{address}/health", env=quiet, log=folder / "mlflow.log", wait_s=240))
        import boto3

        keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket="kills")
        yield Place("s3://kills/store", {**env, "MLFLOW_TRACKING_URI": address})


PLACES = {"folder": in_folder, "s3": on_s3}


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--who", nargs="+", default=WHO, choices=WHO)
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--cases", nargs="+", metavar="zeroN-WHO-PHASE", default=[], help="these instead")
    parser.add_argument("--store", default="folder", choices=PLACES)
    parser.add_argument("--json", type=Path, help="where to add a line of JSON for each kill and each end")
    parser.add_argument("--folder", type=Path, help="where to keep logs and marks; else they are deleted")
    parser.add_argument("more", nargs="*", help="more arguments of the command, after --")
    return parser.parse_args()


def main() -> int:
    """Runs the chains that were asked for; 1 where one of them does not end well."""
    asked = _read_arguments()
    cases = [case for case in EVERY_CASE if _is_asked(case, asked)]
    endings: list[Ending] = []
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        folder.mkdir(parents=True, exist_ok=True)
        place = stack.enter_context(PLACES[asked.store](folder))
        print(HEADER, flush=True)
        for stage, chain in itertools.groupby(cases, key=lambda case: case.stage):
            try:
                for found in run_chain(folder, place, list(chain), *asked.more):
                    endings += [found] if isinstance(found, Ending) else []
                    _tell(found, asked.store, asked.json)
            except AssertionError as error:
                endings.append(Ending(stage, -1, told=str(error)))
                _tell(endings[-1], asked.store, asked.json)
    good = sum(ending.is_good for ending in endings)
    print(f"{good} of {len(endings)} killed trainings ended as the undisturbed ones did")
    return 0 if good == len(endings) else 1


def _is_asked(case: Case, asked: argparse.Namespace) -> bool:
    if asked.cases:
        return case.name in asked.cases
    return case.stage in asked.stages and case.who in asked.who and case.phase in asked.phases


def _tell(found: Outcome | Ending, store: str, path: Path | None) -> None:
    print(shown(found), flush=True)
    if path:
        with path.open("a") as file:
            file.write(json.dumps({"store": store, **asdict(found)}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
