"""Reads checkpoints in this project's first format, which Ray Train stored and DeepSpeed wrote.

They resume only with the number of ranks and the ZeRO stage that wrote them. Their pickles are loaded as tensors only,
so a manipulated file is rejected instead of executed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
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
SNAPSHOT = f"{RAY_RUN}/checkpoint_manager_snapshot.json"  # Ray Train's list of complete checkpoints
ENGINE, BEST = "engine", "best"
# Types in DeepSpeed's files other than tensors, containers and numbers.
_HARMLESS = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


@dataclass(frozen=True)
class OldCheckpoint:
    """The fields of a checkpoint's train.json, and the prefix of its files in the step's folder."""

    described: Mapping[str, Any]
    prefix: str

    def fetch(self, out: Store, folder: Path) -> None:
        """Copies its files into `folder`. Raises ResumeError if one is missing or its digest differs."""
        for name, digest in self.described["digests"].items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(StoreKeyError):
                out.fetch(f"{self.prefix}/{name}", path)
            if not path.is_file() or file_digest(path) != digest:
                raise ResumeError(
                    f"{name} of the checkpoint of epoch {self.described['epoch']} is missing or does not match the "
                    f"digest in train.json: the checkpoint is damaged, and it is the only one; {_begin_again(out)}"
                )


def find_old_checkpoint(out: Store) -> OldCheckpoint | None:
    """The checkpoint that Ray Train would resume from; None if there is none in this format.

    Only the one named in Ray's snapshot counts: a kill during an upload leaves an incomplete folder.
    Raises ResumeError if it is missing or damaged.
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
            f"{out.uri}/{SNAPSHOT} or the checkpoint it names is damaged ({error}): {_begin_again(out)}"
        ) from error


def check_placement(described: Mapping[str, Any], placement: Placement) -> None:
    """Raises ResumeError if the number of workers or the ZeRO stage differs from those that wrote the checkpoint."""
    then = (described["ranks"], described["zero_stage"])
    now = (placement.workers, placement.zero_stage)
    if then != now:
        raise ResumeError(
            f"the checkpoint of epoch {described['epoch']} was written by {then[0]} workers at ZeRO stage {then[1]}, "
            f"in an old format that resumes only with these settings, but this placement has {now[0]} at stage "
            f"{now[1]}; use --placement.workers {then[0]} --placement.zero-stage {then[1]}, or another --run NAME"
        )


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Restricts torch.load in the block to tensors, containers, numbers and DeepSpeed's plain records.

    torch.load then raises ResumeError for a file that contains anything else.
    """
    import torch

    original = torch.load
    torch.load = functools.partial(_load_tensors, original)
    try:
        yield
    finally:
        torch.load = original


def _load_tensors(load: Any, file: Any, *arguments: Any, **options: Any) -> Any:
    import torch

    harmless = [getattr(importlib.import_module(module), name) for module, name in _HARMLESS]
    try:
        with torch.serialization.safe_globals(harmless):
            return load(file, *arguments, **{**options, "weights_only": True})
    except pickle.UnpicklingError as error:
        # Only the name from torch's message: the rest explains how to bypass the check.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise ResumeError(
            f"{Path(str(file)).name} of the checkpoint contains Python objects{what} that could run code when loaded, "
            "so this project did not write it; use another --run NAME"
        ) from None


def _begin_again(out: Store) -> str:
    return f"delete {out.uri}/{RAY_RUN} to train from the beginning, or use another --run NAME"
