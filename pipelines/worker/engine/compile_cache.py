"""Whether compiling a training pays, where its compiled code is kept, and whether it is there already."""

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

# Multiply-accumulates of a training (forward, all images) from which compiling pays. On one H200 a MedMamba-T that is
# compiled makes 7.5e12 a second, and 4.7e12 where it is not; compiled code from the cache takes about 10 s to load.
PAYS_FROM_MACS = 5e13
# What of a training's recipe is part of its compiled code.
_COMPILED_IN = {"micro_batch", "image_size", "precision", "augment", "class_weights", "label_smoothing", "freeze"}
NO_COMPILER = "the training step is not compiled: no C compiler on this machine; install gcc"
NOTICE = "compiling the training step; about a minute, the next start on this machine takes seconds"


def decide_compile(placement: Placement, config: TrainStepConfig, data: Dataset) -> tuple[Placement, str]:
    """The placement with `auto` resolved: on where this training is long enough; and what keeps a long one from it."""
    if placement.compile != "auto":
        return placement, ""
    pays = _pays(config, data, placement.workers)
    needs_compiler = is_compiled(placement.model_copy(update={"compile": "on"}), config.train.precision)
    compiles = pays and (_has_compiler() or not needs_compiler)
    decided = placement.model_copy(update={"compile": "on" if compiles else "off"})
    return decided, NO_COMPILER if pays and not compiles else ""


def is_compiled(placement: Placement, precision: str) -> bool:
    """Whether `placement.compile` means torch.compile, and not only a CUDA graph of the kernels that eager mode runs.

    In float32 on a GPU it means only the graph, which is bit-equal to eager mode. Compiled sums are added in another
    order, and Adam turns that into losses that differ by 3e-4 after three steps at a learning rate of 1e-4, also
    with Inductor's options for eager numerics. On one H200 a step of MedMamba-T takes 126 ms in eager mode, 120 ms as a
    graph, 104 ms compiled. Whoever wants that speed takes tf32 or bfloat16.
    """
    return placement.compile == "on" and not (placement.device == "cuda" and precision == "float32")


def _pays(config: TrainStepConfig, data: Dataset, workers: int) -> bool:
    if not isinstance(config.model, MedMambaConfig):
        return False
    images = config.train.epochs * len(data.index("train")) / workers
    return images * macs(config.model, config.train.image_size) >= PAYS_FROM_MACS


def _has_compiler() -> bool:
    """Whether Triton will find what it compiles its launchers with, by its own rule."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


class CompileCache:
    """The compiled code of one kind of training on this machine."""

    def __init__(self, config: TrainStepConfig, placement: Placement, manifest: Manifest) -> None:
        train = config.train.model_dump(include=_COMPILED_IN)
        data = (manifest.task, manifest.channels)
        model = config.model.model_dump(exclude={"drop_path"})  # drawn outside of what is compiled
        decides = (model, train, data, placement.scan, torch.__version__, torch.version.git_version)
        name = torch.cuda.get_device_name() if placement.device == "cuda" else "cpu"
        key = hashlib.sha256(repr((*decides, name)).encode()).hexdigest()[:32]
        self._remembered = False
        self._folder = cache_folder() / "compiled"
        self._mark = self._folder / f"{key}.done"
        # torch keeps its own code and Triton's there; what the user has set stays.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self._folder))

    @property
    def is_warm(self) -> bool:
        """Whether such a training was compiled on this machine before."""
        return self._mark.exists() and Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()

    def remember(self) -> None:
        """After a step: the code is there. A full disk only means that it is compiled again."""
        if not self._remembered:
            self._remembered = True
            with contextlib.suppress(OSError):
                self._mark.parent.mkdir(parents=True, exist_ok=True)
                self._mark.touch()
