"""`import deepspeed` without the parts that this project does not use."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any


def import_deepspeed(device: str) -> Any:
    """Returns the deepspeed module, set up for "cpu" or "cuda", without its compilers and without MLflow."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    with _absent("mlflow"):  # DeepSpeed's autotuner, unused here, would import it (1.3 s)
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepCompile is unused here, but each engine would import torch's compiler for it.
    deepspeed.runtime.engine.is_deepcompile_supported = lambda: False
    if device == "cpu":  # DeepSpeed would build a shared-memory collective with ninja and g++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _absent(name: str) -> Iterator[None]:
    """Makes imports of `name` fail inside the block, as if it were not installed, unless it is already loaded."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
