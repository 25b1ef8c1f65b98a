"""`import deepspeed` without what this project does not use of it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any


def import_deepspeed(device: str) -> Any:
    """The module, for training on "cpu" or "cuda", without its compilers and without MLflow."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    with _absent("mlflow"):  # its autotuner, which is not used here, would import it: 1.3 s
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its own passes for torch.compile, which are not used here: each engine would import torch's compiler for them.
    deepspeed.runtime.engine.is_deepcompile_supported = lambda: False
    if device == "cpu":  # else it would build a shared-memory collective with ninja and g++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _absent(name: str) -> Iterator[None]:
    """Imports of `name` fail inside the block, as where it is not installed; one that is loaded stays."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
