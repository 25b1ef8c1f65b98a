"""Checkpoints in this project's first format, which Ray Train stored and DeepSpeed wrote: read, never written.

They resume on as many ranks and at the ZeRO stage that wrote them. Their pickles are read as tensors only, so a
manipulated one is refused instead of run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.store import Store, StoreKeyError
from pipelines.placement import Placement
from pipelines.worker.state import ResumeError, file_digest, read_described

RAY_RUN = "ray"
SNAPSHOT = f"{RAY_RUN}/checkpoint_manager_snapshot.json"  # Ray Train's own list of the checkpoints that are complete
ENGINE, BEST = "engine", "best"
# What DeepSpeed's files hold beside tensors, containers and numbers.
_HARMLESS = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


@dataclass(frozen=True)
class OldCheckpoint:
    """The fields of its train.json, and where its files are below the step's folder."""

    described: Mapping[str, Any]
    prefix: str

    def fetch(self, out: Store, folder: Path) -> None:
        """Copies its files into `folder`; ResumeError where one is missing or has another digest than on record."""
        for name, digest in self.described["digests"].items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(StoreKeyError):
                out.fetch(f"{self.prefix}/{name}", path)
            if not path.is_file() or file_digest(path) != digest:
                raise ResumeError(
                    f"{name} of the checkpoint of epoch {self.described['epoch']} is missing or has another digest "
                    f"than train.json says: the checkpoint is damaged, and it is the only one; {_begin_again(out)}"
                )


def find_old_checkpoint(out: Store) -> OldCheckpoint | None:
    """The checkpoint that Ray Train would resume from; None where there is none of this format.

    Only what Ray's snapshot names counts: a kill in the middle of an upload leaves a folder of which files are missing.
    """
    try:
        newest = json.loads(out.get(SNAPSHOT))["latest_checkpoint_result"]
        if not newest:
            return None
        prefix = f"{RAY_RUN}/{newest['checkpoint_dir_name']}"
        return OldCheckpoint(read_described(out.get(f"{prefix}/train.json"), remedy=_begin_again(out)), prefix)
    except StoreKeyError as error:
        if out.head(SNAPSHOT) is None:
            return None
        raise ResumeError(f"{error}, which {SNAPSHOT} names: {_begin_again(out)}") from error
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResumeError(
            f"{out.uri}/{SNAPSHOT} or the checkpoint it names is torn ({error}): {_begin_again(out)}"
        ) from error


def check_placement(described: Mapping[str, Any], placement: Placement) -> None:
    """Raises ResumeError where an old checkpoint was written under another world."""
    then = (described["ranks"], described["zero_stage"])
    now = (placement.workers, placement.zero_stage)
    if then != now:
        raise ResumeError(
            f"the checkpoint of epoch {described['epoch']} was written by {then[0]} workers at ZeRO stage {then[1]}, "
            f"in a format that resumes only there; this placement has {now[0]} at stage {now[1]}. Resume with "
            f"--placement.workers {then[0]} --placement.zero-stage {then[1]}, or begin again with another --run NAME"
        )


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Within the block torch.load builds nothing but tensors, containers, numbers and DeepSpeed's plain records.

    Raises ResumeError for a file that holds anything else.
    """
    import torch

    original = torch.load
    torch.load = functools.partial(_load_tensors, original)
    try:
        yield
    finally:
        torch.load = original


def _load_tensors(load: Any, file: Any, *arguments: Any, **options: Any) -> Any:
    import importlib

    import torch

    harmless = [getattr(importlib.import_module(module), name) for module, name in _HARMLESS]
    try:
        with torch.serialization.safe_globals(harmless):
            return load(file, *arguments, **{**options, "weights_only": True})
    except pickle.UnpicklingError as error:
        # Of torch's text only the name: the rest explains how to load the file all the same.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise ResumeError(
            f"{Path(str(file)).name} of the checkpoint holds Python objects{what}, which could run code when they are "
            "loaded: it is not one that this project wrote; use another --run NAME"
        ) from None


def _begin_again(out: Store) -> str:
    return f"delete {out.uri}/{RAY_RUN} to train from the beginning, or use another --run NAME"
