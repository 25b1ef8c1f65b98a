"""Checkpoints in the project's first format, made again from one of today's.

DeepSpeed saves its own files, and they are laid out as Ray Train stored them, with Ray's list of checkpoints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from data_shards.store import Store
from pipelines.worker.checkpoint.stored import FOLDER, MOMENTS, OF_MODEL, Found
from pipelines.worker.checkpoint.usage import USAGE
from pipelines.worker.engine.engine import TAG, Engine
from pipelines.worker.engine.first_format import BEST, ENGINE, RAY_RUN, SNAPSHOT
from pipelines.worker.engine.snapshot import read_tensors
from pipelines.worker.state import described_bytes, file_digest

NAME = "checkpoint_2026-01-01_00-00-00.000001"
FIELDS = (
    "epoch", "consumed", "step", "best_epoch", "best", "history", "seed", "ranks", "zero_stage", "compile", "manifest"
)  # fmt: skip


def replace_by_first_format(out: Store, found: Found, engine: Engine) -> None:
    """Replaces all checkpoints of a training in a local store by this one; every rank calls it.

    `engine` was built on the checkpoint's weights.
    """
    folder = Path(out.uri) / RAY_RUN / NAME
    engine.restore(read_tensors(found.files[MOMENTS]))
    engine._engine.save_checkpoint(str(folder / ENGINE), tag=TAG, save_latest=False)
    engine.gather(None)  # all ranks have saved
    if engine.rank > 0:
        return
    for file in (*OF_MODEL, USAGE):
        shutil.copy(found.files[file], folder / file)
    (folder / BEST).mkdir()
    for file, path in found.best.items():
        shutil.copy(path, folder / BEST / file)
    write_state(folder, {field: found.described[field] for field in FIELDS})
    out.put(SNAPSHOT, json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": NAME}}).encode())
    shutil.rmtree(Path(out.uri) / FOLDER)


def write_state(folder: Path, fields: dict) -> None:
    """train.json of a checkpoint in this folder, with the digests of its files as they are now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "train.json")
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    (folder / "train.json").write_bytes(described_bytes({**fields, "flat": False, "digests": digests}))
