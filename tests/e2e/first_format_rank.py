"""One rank that turns the newest checkpoint of a step into one of the project's first format, in place.

`first_format_rank.py STORE RUN ZERO_STAGE`: DeepSpeed saves its own files again, and they are laid out as Ray Train
stored them, under `ray/` with Ray's list of checkpoints.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.model import build_model
from pipelines.placement import Placement
from pipelines.worker.checkpoints import FOLDER, OF_MODEL, Checkpoints
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.engine import TAG, build_engine
from pipelines.worker.old_checkpoint import BEST, ENGINE, RAY_RUN, SNAPSHOT
from pipelines.worker.resume import FromCheckpoint, find_resume
from pipelines.worker.snapshot import read_tensors
from pipelines.worker.state import described_bytes, file_digest

NAME = "checkpoint_2026-01-01_00-00-00.000001"
NEW_FIELDS = ("best_step", "best_digests", "digest", "digests")


def main() -> None:
    store, run, zero_stage = sys.argv[1:]
    root = open_store(store)
    out = root.at("runs", run, "train")
    data = open_dataset(root.at("datasets/phantoms/default"))
    config = TrainStepConfig.model_validate(json.loads(out.get("config.json"))["config"])
    config = config.with_classes(len(data.manifest.classes))
    placement = Placement(
        workers=int(os.environ["WORLD_SIZE"]), device="cpu", cpus_per_worker=1, zero_stage=int(zero_stage), scan="auto",
        trials=1, nodes=1,
    )  # fmt: skip
    folder = Path(out.uri) / RAY_RUN / NAME
    with TemporaryDirectory() as fetched:
        resume = find_resume(Checkpoints(out), Path(fetched), data.digest)
        found = Checkpoints(out).newest(Path(fetched))
        assert isinstance(resume, FromCheckpoint)
        assert found is not None
        model = build_model(config.model, scan="auto", device="cpu")
        resume.load_weights(model)
        engine = build_engine(model, config.train, placement)
        engine.restore(read_tensors(found.files["moments.safetensors"]))
        engine._engine.save_checkpoint(str(folder / ENGINE), tag=TAG, save_latest=False)
        dist.barrier()
        if engine.rank == 0:
            for file, path in found.files.items():
                if file in (*OF_MODEL, "usage.json"):
                    shutil.copy(path, folder / file)
            for file, path in found.best.items():
                (folder / BEST).mkdir(exist_ok=True)
                shutil.copy(path, folder / BEST / file)
            kept = {name: value for name, value in found.described.items() if name not in NEW_FIELDS}
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
            (folder / "train.json").write_bytes(described_bytes({**kept, "flat": False, "digests": digests}))
            out.put(SNAPSHOT, json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": NAME}}).encode())
            shutil.rmtree(Path(out.uri) / FOLDER)
    print(json.dumps({"epoch": resume.state.epoch}))


if __name__ == "__main__":
    main()
