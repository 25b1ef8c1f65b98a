"""Kills in the middle of trainings, and whether the same command then ends with the same weights.

    python tests/cluster/training_kills.py --stages 0 1 2 3 --store s3 --json kills.json

Every training has two workers on CPUs. A process is killed (SIGKILL) in a phase of the training; where the command ends
with an error it is given again, and the weights are compared with those of a training that nobody disturbed. A line for
each case: the exit codes, seconds from the kill to the next step, steps made again, whether the weights are equal, and
whether MLflow has each epoch. Exits with 1 where one of these is wrong or a training does not end. The phases are seen
through tests/cluster/marked/sitecustomize.py; the product knows nothing of it.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "e2e")]

from chain import TINY, command, environment
from conftest import free_port, service

WHO = ("worker", "driver", "node", "all")
# Phase -> its mark, and how often the rank has come there before the kill: in the second epoch, but for the first.
PHASES = {
    "start": ("begin", 1),
    "epoch": ("step-2-3", 1),
    "checkpoint": ("writing", 2),
    "validation": ("validating", 2),
}
EPOCHS = 3
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
    codes: list[int] = field(default_factory=list)
    """Of the command and of each time it was given again."""
    was_in_phase: bool = False
    """Whether the process of the mark had come to no later one when it was killed."""
    next_step_s: float | None = None
    """From the kill to the next step of a new process."""
    total_s: float = 0.0
    """From the first command to the end of the last."""
    steps_again: int = 0
    """Steps that rank 0 made more than once."""
    is_equal: bool = False
    """Whether the weights are those of the undisturbed training."""
    is_logged: bool = False
    """Whether MLflow's run is finished and has each epoch once."""
    told: list[str] = field(default_factory=list)
    """The last line of each command that failed, and what each resumed from."""

    @property
    def is_good(self) -> bool:
        """Whether the training ended as the undisturbed one did."""
        return self.is_equal and self.is_logged


@dataclass(frozen=True)
class Mark:
    """A rank came to a phase."""

    at: float
    pid: int
    rank: int
    name: str


class Training:
    """One training, seen from outside."""

    def __init__(self, folder: Path, place: Place, case: Case, *more: str, pause: str = "") -> None:
        self._folder, self._marks, self._tries = folder, folder / "marks", 0
        folder.mkdir(parents=True)
        self._arguments = [
            "train", *TINY, "--train.epochs", str(EPOCHS), "--run", case.name, "--json", "--store", place.store,
            "--placement.workers", "2", "--placement.zero-stage", str(case.stage), *more,
        ]  # fmt: skip
        path = os.pathsep.join([str(HERE / "marked"), str(HERE.parents[1])])
        marks = {"MEDMAMBA_TEST_MARKS": str(self._marks), "MEDMAMBA_TEST_PAUSE": pause}
        self._env = environment({**place.env, **marks, "PYTHONPATH": path})

    def start(self) -> subprocess.Popen:
        """Gives the command, for the first time or again."""
        self._tries += 1
        with self._out().open("wb") as out, self._err().open("wb") as err:
            return subprocess.Popen(
                command(*self._arguments), env=self._env, stdout=out, stderr=err, start_new_session=True
            )

    def finish(self, process: subprocess.Popen) -> int:
        """Its exit code; AssertionError where it hangs."""
        try:
            return process.wait(OUTLASTS_S)
        except subprocess.TimeoutExpired:
            kill(family(process.pid))
            raise AssertionError(f"the command did not end within {OUTLASTS_S:g} s: {self.told()[-2000:]}") from None

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

    def wait_for(self, name: str, count: int, rank: int, process: subprocess.Popen) -> int:
        """Waits until a rank has come to a mark so often; returns its process."""
        deadline = time.monotonic() + OUTLASTS_S
        while True:
            pids = [mark.pid for mark in self.marks() if (mark.name, mark.rank) == (name, rank)]
            if len(pids) >= count:
                return pids[count - 1]
            assert process.poll() is None, f"the command ended before {name}: {self.told()[-2000:]}"
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


def run_undisturbed(folder: Path, place: Place, stage: int, *more: str) -> str:
    """The digest of a training that nobody disturbs; an earlier call's, where the folder has it."""
    known = folder / f"whole-{stage}.digest"
    if known.exists():
        return known.read_text()
    training = Training(folder / f"whole-{stage}", place, Case(stage, "nobody", "never"), *more)
    code = training.finish(training.start())
    assert code == 0, training.told()[-3000:]
    known.write_text(training.facts()["digest"])
    return known.read_text()


def run_case(folder: Path, place: Place, case: Case, digest: str, *more: str) -> Outcome:
    """Kills once and brings the training to its end."""
    mark, count = PHASES[case.phase]
    rank = 0 if case.phase == "checkpoint" else case.stage % 2  # only rank 0 writes
    training = Training(folder / case.name, place, case, *more, pause=mark)
    outcome, began = Outcome(case.stage, case.who, case.phase), time.time()
    driver = training.start()
    worker = training.wait_for(mark, count, rank, driver)
    killed = victims(case.who, driver.pid, worker)
    assert killed, f"there is no {case.who} to kill"
    kill(killed)
    killed_at = time.time()
    last = [each for each in training.marks() if each.pid == worker][-1]
    outcome.was_in_phase = last.name == mark
    outcome.codes.append(training.finish(driver))
    while outcome.codes[-1] != 0 and len(outcome.codes) < MOST_TRIES:
        outcome.told.append(_last_line(training.told()))
        driver = training.start()
        outcome.codes.append(training.finish(driver))
    outcome.total_s = round(time.time() - began, 1)
    outcome.told += [line for line in training.told().splitlines() if "resumes" in line or "checkpoint" in line]
    _measure(outcome, training.marks(), killed_at)
    if outcome.codes[-1] == 0:
        facts = training.facts()
        outcome.is_equal = facts["digest"] == digest
        outcome.is_logged = _is_logged(place, facts["mlflow_run"])
    return outcome


def _is_logged(place: Place, run: str) -> bool:
    from mlflow import MlflowClient

    client = MlflowClient(place.env.get("MLFLOW_TRACKING_URI", f"sqlite:///{place.store}/mlflow.db"))
    epochs = [point.step for point in client.get_metric_history(run, "train_loss")]
    return client.get_run(run).info.status == "FINISHED" and sorted(epochs) == list(range(1, EPOCHS + 1))


def _measure(outcome: Outcome, marks: list[Mark], killed_at: float) -> None:
    before = {mark.pid for mark in marks if mark.at <= killed_at}
    after = [mark.at for mark in marks if mark.pid not in before and mark.name.startswith("step-")]
    outcome.next_step_s = round(min(after) - killed_at, 1) if after else None
    made = [mark.name for mark in marks if mark.rank == 0 and mark.name.startswith("step-")]
    outcome.steps_again = len(made) - len(set(made))


def _last_line(told: str) -> str:
    lines = [line for line in told.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def shown(outcome: Outcome) -> str:
    """The outcome as a line of the table."""
    seconds = "-" if outcome.next_step_s is None else f"{outcome.next_step_s:.1f}"
    weights = "equal" if outcome.is_equal else "DIFFERENT"
    logged = "complete" if outcome.is_logged else "INCOMPLETE"
    missed = "" if outcome.was_in_phase else "  (the kill came after the phase)"
    return (
        f"{outcome.stage:>4}  {outcome.who:<7} {outcome.phase:<11} {'/'.join(map(str, outcome.codes)):<8} "
        f"{seconds:>7} {outcome.steps_again:>6}  {weights:<9}  {logged}{missed}"
    )


HEADER = f"{'ZeRO':>4}  {'killed':<7} {'in':<11} {'codes':<8} {'next, s':>7} {'again':>6}  {'weights':<9}  MLflow"


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


def run_cases(folder: Path, place: Place, cases: Sequence[Case], *more: str) -> Iterator[Outcome]:
    """The outcomes, each as soon as it is there."""
    whole: dict[int, str] = {}
    for case in cases:
        if case.stage not in whole:
            whole[case.stage] = run_undisturbed(folder, place, case.stage, *more)
        try:
            yield run_case(folder, place, case, whole[case.stage], *more)
        except AssertionError as error:
            yield Outcome(case.stage, case.who, case.phase, told=[str(error)])


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--who", nargs="+", default=WHO, choices=WHO)
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--cases", nargs="+", metavar="zeroN-WHO-PHASE", help="these instead")
    parser.add_argument("--store", default="folder", choices=PLACES)
    parser.add_argument("--json", type=Path, help="where to add a line of JSON for each case")
    parser.add_argument("--folder", type=Path, help="where to keep logs and marks; else they are deleted")
    parser.add_argument("more", nargs="*", help="more arguments of the command, after --")
    return parser.parse_args()


def main() -> int:
    """Runs the cases that were asked for; 1 where one of them is not good."""
    asked = _read_arguments()
    cases = [Case(*each) for each in itertools.product(asked.stages, asked.who, asked.phases)]
    if asked.cases:
        cases = [each for name in asked.cases for each in EVERY_CASE if each.name == name]
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        folder.mkdir(parents=True, exist_ok=True)
        place = stack.enter_context(PLACES[asked.store](folder))
        print(HEADER, flush=True)
        for outcome in run_cases(folder, place, cases, *asked.more):
            outcomes.append(outcome)
            print(shown(outcome), *([] if outcome.is_good else outcome.told), sep="\n      ", flush=True)
            if asked.json:
                with asked.json.open("a") as file:
                    file.write(json.dumps({"store": asked.store, **asdict(outcome)}) + "\n")
    good = sum(outcome.is_good for outcome in outcomes)
    print(f"{good} of {len(outcomes)} kills ended as the undisturbed training did")
    return 0 if good == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
