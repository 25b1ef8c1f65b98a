"""One rank of trainings that start from weights: `finetuned_rank.py DATASET FOLDER ZERO_STAGE [flat]`.

Trains from random weights; then from that model with frozen parameters and layer-wise decay, from it as an upstream
checkpoint, and resumes the former without its weights, in a placement of the other kind. Prints the losses, and which
tensors moved, as JSON.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file

from data_shards.loader.augment_config import AugmentConfig
from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.checkpoint import export_upstream, load_model
from medmamba.config import MedMambaConfig
from medmamba.optim import OptimConfig
from pipelines.initial_weights import find_weights, kept_uri
from pipelines.placement import Placement
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.launch import train_on_dataset

FREEZE = ("patch_embed.*", "layers.0.*")
# Without augmentation: the images are then learned within a few epochs, and what weights are worth is plain to see.
PLAIN = AugmentConfig(hflip=0, translate=0, scale=0, rotate=0, brightness=0, contrast=0)
OPTIM = OptimConfig(lr=3e-3, warmup_epochs=1)
TRAIN = TrainConfig(epochs=2, batch_size=16, micro_batch=16, image_size=32, optim=OPTIM, augment=PLAIN)


class Saver:
    """A reporter that keeps every loss; the checkpoints of its training are below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses = folder, []

    @property
    def models(self) -> list[Path]:
        """The folders of the checkpoints, oldest first; each holds a model."""
        return sorted((self.folder / "checkpoints").iterdir())

    def warn(self, text: str) -> None:
        """Nothing is wrong here."""
        raise AssertionError(text)

    def progress(self, **values: object) -> None:
        """Nobody looks."""

    def epoch(self, metrics: dict, step_losses: list[float]) -> None:
        """Keeps the losses of an epoch."""
        self.losses += step_losses


class Trainings:
    """Trainings on one dataset at one ZeRO stage."""

    def __init__(self, dataset: str, folder: Path, zero_stage: int, *, flat: bool) -> None:
        self.dataset, self.folder, self.store = dataset, folder, open_store(str(folder / "store"))
        self.placement = Placement(
            workers=1, device="cpu", cpus_per_worker=1, zero_stage=zero_stage, scan="auto",
            concurrent_trials=1, nodes=1, flat=flat,
        )  # fmt: skip

    def train(self, name: str, init: Path | None = None, resume: Path | None = None, **changes) -> Saver:
        """The training `name`, whose checkpoints are in a folder of that name."""
        digest = self.keep(init) if init is not None else ""
        config = TrainStepConfig(model=MedMambaConfig(), train=TRAIN.model_copy(update={"init": digest, **changes}))
        uri = kept_uri(config, self.store)
        saver = Saver(self.folder / name)
        if resume is not None:
            shutil.rmtree(self.store.uri)  # a checkpoint holds all that it needs
            shutil.copytree(resume, saver.folder / "checkpoints" / resume.name)
        data = (self.dataset, open_dataset(self.dataset).digest)
        checkpoints = Checkpoints(open_store(str(saver.folder)))
        train_on_dataset(config, self.placement, data, lambda rank: saver, checkpoints, init=uri)
        return saver

    def keep(self, init: Path) -> str:
        """Keeps weights in the store as the driver does; their digest."""
        found = find_weights(str(init), self.store)
        found.keep(self.store)
        return found.digest


def moved(before: Path, after: Path) -> list[str]:
    """The tensors that differ between two checkpoints."""
    old, new = (load_file(folder / "weights.safetensors") for folder in (before, after))
    return [name for name in old if old[name].shape != new[name].shape or not old[name].equal(new[name])]


def largest_change(before: Path, after: Path, start: str) -> float:
    """Of all numbers in the parameters whose names begin with `start`."""
    old, new = (load_file(folder / "weights.safetensors") for folder in (before, after))
    names = [name for name in old if name.startswith(start) and "running" not in name and "tracked" not in name]
    return max(float((new[name] - old[name]).abs().max()) for name in names)


def main() -> None:
    dataset, folder, stage = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    trainings = Trainings(dataset, folder, stage, flat=sys.argv[4:] == ["flat"])
    base = trainings.train("base", epochs=6).models[-1]
    export_upstream(load_model(base)[0], folder / "base.pth")
    slow = TRAIN.optim.model_copy(update={"layer_decay": 0.5})
    tuned = trainings.train("tuned", base, freeze=FREEZE, optim=slow)
    probe = trainings.train("probe", base, freeze=("patch_embed.*", "layers.*"))
    nearly_still = TRAIN.optim.model_copy(update={"layer_decay": 1e-6})
    slow_layers = trainings.train("slow layers", base, optim=nearly_still).models[-1]
    seen = {
        "slow layers": {part: largest_change(base, slow_layers, part) for part in ("layers.3.", "head.")},
        "probe moved": moved(base, probe.models[-1]),
        "scratch": trainings.train("scratch", seed=1).losses,
        "tuned": tuned.losses,
        "tuned moved": moved(base, tuned.models[-1]),
        "upstream": trainings.train("upstream", folder / "base.pth").losses,
    }
    resumed = trainings.train("resumed", base, tuned.models[0], freeze=FREEZE, optim=slow)
    seen["resumed moved"] = moved(tuned.models[-1], resumed.models[-1])
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
