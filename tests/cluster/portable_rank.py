"""One rank of a training that goes from one world to the next: `portable_rank.py DATASET OUT ZERO_STAGE FORM STOP`.

FORM is "flat" or "whole". Resumes from the newest checkpoint in OUT, checks that weights and moments are those that
were saved, trains until step STOP, where it writes a checkpoint, and prints the losses of its steps as JSON.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.model import build_model
from medmamba.optim import OptimConfig
from pipelines.placement import Placement
from pipelines.worker.checkpoint.resume import find_resume
from pipelines.worker.checkpoint.stored import MOMENTS, Checkpoints
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.engine.engine import build_engine
from pipelines.worker.engine.snapshot import read_tensors
from pipelines.worker.group.control import Stopped, UntilTheEnd, Wants, Writer
from pipelines.worker.launch import train_on_dataset
from pipelines.worker.state import training_digest

TRAIN = TrainConfig(epochs=20, batch_size=48, micro_batch=8, image_size=64, optim=OptimConfig(lr=1e-4))


class StopsAt(UntilTheEnd):
    """Ends the training after a step."""

    def __init__(self, step: int) -> None:
        self._left = step

    def wants(self, step: int, writer: Writer) -> Wants:
        """A checkpoint and the end after the last of the steps."""
        self._left -= 1
        return Wants(stop="enough" if self._left == 0 else "")


class Losses:
    """A reporter that keeps nothing: the losses are in the checkpoint."""

    def progress(self, **values: object) -> None:
        """Nobody looks."""

    def begin(self, what: str) -> None:
        """Nor waits."""

    def warn(self, text: str) -> None:
        """Something is wrong, which the test has to see."""
        raise AssertionError(text)

    def epoch(self, metrics: dict, step_losses: list[float]) -> None:
        """The epochs are longer than this test."""
        raise AssertionError("the epoch ended")


def is_restored(config: TrainStepConfig, placement: Placement, checkpoints: Checkpoints, manifest: str) -> bool:
    """Whether an engine that resumed holds exactly the weights and moments of the newest checkpoint."""
    with TemporaryDirectory() as folder:
        resume = find_resume(checkpoints, Path(folder), manifest, training=training_digest(config))
        found = checkpoints.newest(Path(folder))
        assert resume is not None
        assert found is not None
        model = build_model(config.model, scan="auto", device="cpu")
        resume.load_weights(model)
        engine = build_engine(model, config.train, placement)
        engine.restore(read_tensors(found.files[MOMENTS]))
        snapshot = engine.snapshot()
        if snapshot is None:
            return True
        held = {**snapshot.weights, **snapshot.moments}
        saved = {**read_tensors(found.files["weights.safetensors"]), **read_tensors(found.files[MOMENTS])}
        return held.keys() == saved.keys() and all(held[name].equal(saved[name]) for name in saved)


def main() -> None:
    dataset, out, zero_stage, form, stop = sys.argv[1:]
    data = open_dataset(dataset)
    placement = Placement(
        workers=int(os.environ["WORLD_SIZE"]), device="cpu", cpus_per_worker=1, zero_stage=int(zero_stage), scan="auto",
        concurrent_trials=1, nodes=1, flat=form == "flat",
    )  # fmt: skip
    config = TrainStepConfig(train=TRAIN).with_classes(len(data.manifest.classes))
    checkpoints = Checkpoints(open_store(out))
    begun = checkpoints.newest_state()
    restored = is_restored(config, placement, checkpoints, data.digest) if begun else True
    done = begun["step"] if begun else 0
    with contextlib.suppress(Stopped):
        train_on_dataset(
            config, placement, (dataset, data.digest), lambda rank: Losses(), checkpoints,
            control=StopsAt(int(stop) - done),
        )  # fmt: skip
    state = checkpoints.newest_state()
    print(json.dumps({"restored": restored, "losses": state["losses"][done:] if state else None}))


if __name__ == "__main__":
    main()
