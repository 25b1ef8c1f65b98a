"""Trainings that resume after a damage, in one process: `damaged_trainings.py DATASET FOLDER`.

Prints, as JSON, for each damage to each file: what the training said, the step it resumed from, and whether it ended
with the weights of an undisturbed one. tests/e2e/test_damaged_checkpoints.py does the same through the command line.
"""

import contextlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from first_format import FIELDS, replace_by_first_format, write_state

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.config import MedMambaConfig
from medmamba.model import build_model
from pipelines.placement import Placement
from pipelines.worker.checkpoint.resume import FromCheckpoint
from pipelines.worker.checkpoint.stored import FILES, STATE, Checkpoints
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.engine.engine import build_engine
from pipelines.worker.group.control import Stopped, UntilTheEnd, Wants, Writer
from pipelines.worker.launch import train_on_dataset, world_of_one
from pipelines.worker.state import ResumeError, described_bytes, file_digest

CONFIG = TrainStepConfig(
    model=MedMambaConfig(variant="nano", drop_path=0.2),
    train=TrainConfig(epochs=3, batch_size=8, micro_batch=4, image_size=32),
)
PLACEMENT = Placement(
    workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="numba", concurrent_trials=1, nodes=1
)
STOP = 6  # of four steps an epoch: a checkpoint is at the end of the first, and one in the middle of the second


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


class StopsAt(UntilTheEnd):
    """Ends the training after a step, at a checkpoint."""

    def wants(self, step: int, writer: Writer) -> Wants:
        """The end, after that step."""
        return Wants(stop="enough" if step == STOP else "")


class Warnings(list):
    """A reporter that keeps what is said, and from which step of an epoch on something was done."""

    first: int | None = None

    def progress(self, **values: int) -> None:
        """Keeps the first."""
        self.first = self.first or (values["epoch"] - 1) * values["steps"] + values["step"]

    def begin(self, what: str) -> None:
        """Nobody waits."""

    def warn(self, text: str) -> None:
        """Keeps it."""
        self.append(text)

    def epoch(self, metrics: dict, step_losses: list[float]) -> None:
        """They are in the checkpoint."""


def train(dataset: str, folder: Path, control: UntilTheEnd | None = None) -> Warnings:
    """Trains to the end, or until the control ends it; what it said."""
    said = Warnings()
    digest, out = open_dataset(dataset).digest, Checkpoints(open_store(str(folder)))
    with contextlib.suppress(Stopped):
        train_on_dataset(CONFIG, PLACEMENT, (dataset, digest), lambda rank: said, out, control=control)
    return said


def weights(folder: Path) -> dict:
    """Digests of what the newest checkpoint holds of the network and of the optimizer."""
    state = json.loads(newest(folder).joinpath(STATE).read_text())
    return {file: digest for file, digest in state["digests"].items() if file != "usage.json"}


def newest(folder: Path) -> Path:
    """The folder of the newest checkpoint."""
    return max((folder / "checkpoints").iterdir())


def flip_bit(path: Path) -> None:
    """In the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    """As a torn write leaves it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def plant_pickle(path: Path) -> None:
    """A harmful one, under a corrected digest."""
    path.write_bytes(pickle.dumps(Harmful(path.parents[2] / f"ran-{path.name}")))
    state = path.with_name(STATE)
    if path == state:
        return
    described = json.loads(state.read_text())
    described["digests"][path.name] = file_digest(path)
    if described["best_step"] == described["step"] and path.name in described["best_digests"]:
        described["best_digests"][path.name] = file_digest(path)
    del described["digest"]
    state.write_bytes(described_bytes(described))


DAMAGES: tuple[Callable[[Path], None], ...] = (flip_bit, cut_in_half, Path.unlink, plant_pickle)


def use_first_format(dataset: str, case: Path, *, plant: bool = False) -> None:
    """Replaces the checkpoints by that of the first epoch in the first format; with a harmful pickle in it."""
    shutil.rmtree(newest(case))
    out, classes = open_store(str(case)), len(open_dataset(dataset).manifest.classes)
    config = CONFIG.with_classes(classes)
    found = Checkpoints(out).newest(case)
    assert found is not None
    model = build_model(config.model, scan=PLACEMENT.scan, device="cpu")
    FromCheckpoint(found).load_weights(model)
    replace_by_first_format(out, found, build_engine(model, config.train, PLACEMENT))
    if plant:
        (path,) = case.rglob("*.pt")
        torch.save({**torch.load(path, weights_only=False), "mark": Harmful(case / "ran-engine")}, path)
        write_state(path.parents[2], {field: found.described[field] for field in FIELDS})


def resume(dataset: str, folder: Path, case: Path) -> dict:
    """How a training ends whose store was changed."""
    try:
        said = train(dataset, case)
        found = {"said": list(said), "first": said.first, "equal": weights(case) == weights(folder / "whole")}
    except ResumeError as error:
        found = {"refused": str(error)}
    return {**found, "ran": [path.name for path in case.glob("ran-*")]}


def main() -> None:
    dataset, folder = sys.argv[1], Path(sys.argv[2])
    world_of_one(PLACEMENT.backend)
    train(dataset, folder / "whole")
    train(dataset, folder / "stopped", StopsAt())
    found = {}
    for damage in DAMAGES:
        for file in (*FILES, STATE):
            name = f"{damage.__name__} {file}"
            case = folder / name.replace(" ", "-")
            shutil.copytree(folder / "stopped", case)
            damage(newest(case) / file)
            found[name] = resume(dataset, folder, case)
    for name, plant in (("first format", False), ("planted in the first format", True)):
        case = folder / name.replace(" ", "-")
        shutil.copytree(folder / "stopped", case)
        use_first_format(dataset, case, plant=plant)
        found[name] = resume(dataset, folder, case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
