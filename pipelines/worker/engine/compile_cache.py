"""Decides whether compiling a training pays off, and manages the cache of compiled code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import torch

from data_shards.manifest import Dataset, Manifest
from medmamba.config import MedMambaConfig
from medmamba.cost import macs
from medmamba.ops.build_cache import cache_folder
from pipelines.placement import Placement
from pipelines.worker.config import TrainStepConfig

# Compiling pays off from this many multiply-accumulates (forward passes of the complete training). On one H200
# MedMamba-T does 7.5e12 per second compiled and 4.7e12 otherwise; loading compiled code from the cache takes 10 s.
PAYS_FROM_MACS = 5e13
# The settings of a recipe that are part of its compiled code.
_COMPILED_IN = {"micro_batch", "image_size", "precision", "augment", "class_weights", "label_smoothing", "freeze"}
NO_COMPILER = "the training step is not compiled: no C compiler found on this machine; install gcc"
NOTICE = "compiling the training step; this takes about a minute, later starts on this machine take seconds"


def decide_compile(placement: Placement, config: TrainStepConfig, data: Dataset) -> tuple[Placement, str]:
    """Resolves `placement.compile` "auto": on if this training is long enough for it to pay off.

    Returns the placement and a warning if a long training cannot be compiled here, otherwise "".
    """
    if placement.compile != "auto":
        return placement, ""
    pays = _pays(config, data, placement.workers)
    needs_compiler = is_compiled(placement.model_copy(update={"compile": "on"}), config.train.precision)
    compiles = pays and (_has_compiler() or not needs_compiler)
    decided = placement.model_copy(update={"compile": "on" if compiles else "off"})
    return decided, NO_COMPILER if pays and not compiles else ""


def is_compiled(placement: Placement, precision: str) -> bool:
    """Whether `placement.compile` means torch.compile, or only a CUDA graph of eager mode's kernels.

    In float32 on a GPU it is only the graph, which is bit-identical to eager mode. Compiled kernels sum in another
    order, and Adam turns that into losses that differ by 3e-4 after three steps at a learning rate of 1e-4, even with
    Inductor's options for eager numerics. On one H200 a step of MedMamba-T takes 126 ms in eager mode, 120 ms as a
    graph and 104 ms compiled. Use tf32 or bfloat16 for that speed.
    """
    return placement.compile == "on" and not (placement.device == "cuda" and precision == "float32")


def _pays(config: TrainStepConfig, data: Dataset, workers: int) -> bool:
    if not isinstance(config.model, MedMambaConfig):
        return False
    images = config.train.epochs * len(data.index("train")) / workers
    return images * macs(config.model, config.train.image_size) >= PAYS_FROM_MACS


def _has_compiler() -> bool:
    """Whether Triton, by its own rule, will find a C compiler for its launchers."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


class CompileCache:
    """The compiled code of one kind of training on this machine."""

    def __init__(self, config: TrainStepConfig, placement: Placement, manifest: Manifest) -> None:
        train = config.train.model_dump(include=_COMPILED_IN)
        data = (manifest.task, manifest.channels)
        model = config.model.model_dump(exclude={"drop_path"})  # drawn outside the compiled code
        decides = (model, train, data, placement.scan, torch.__version__, torch.version.git_version)
        name = torch.cuda.get_device_name() if placement.device == "cuda" else "cpu"
        key = hashlib.sha256(repr((*decides, name)).encode()).hexdigest()[:32]
        self._remembered = False
        self._folder = cache_folder() / "compiled"
        self._mark = self._folder / f"{key}.done"
        # torch keeps its own code and Triton's there. A value set by the user wins.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self._folder))

    @property
    def is_warm(self) -> bool:
        """Whether this kind of training was compiled on this machine before."""
        return self._mark.exists() and Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()

    def remember(self) -> None:
        """Called after a step: marks the code as cached. Ignores a full disk; the code is then compiled again."""
        if not self._remembered:
            self._remembered = True
            with contextlib.suppress(OSError):
                self._mark.parent.mkdir(parents=True, exist_ok=True)
                self._mark.touch()
