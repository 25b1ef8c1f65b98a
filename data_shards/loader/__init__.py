"""Manifest -> micro-batches. Names are imported lazily, so that a decoding process loads only its own module."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_shards.loader.batch_plan import BatchPlan
    from data_shards.loader.epoch import Epoch
    from data_shards.loader.loader import CACHE_BYTES, Loader
    from data_shards.loader.micro_batch import GpuMemory, MicroBatch

__all__ = ["CACHE_BYTES", "BatchPlan", "Epoch", "GpuMemory", "Loader", "MicroBatch"]

_MODULES = {
    "CACHE_BYTES": "loader",
    "BatchPlan": "batch_plan",
    "Epoch": "epoch",
    "GpuMemory": "micro_batch",
    "Loader": "loader",
    "MicroBatch": "micro_batch",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
