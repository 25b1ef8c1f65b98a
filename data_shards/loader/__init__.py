"""Manifest -> batches. A name is imported on first use, so that a decoding process loads only its own module."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_shards.loader.rank_batches import CACHE_BYTES, Batch, Batches, GpuMemory, batches, read_images

__all__ = ["CACHE_BYTES", "Batch", "Batches", "GpuMemory", "batches", "read_images"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data_shards.loader import rank_batches

    return getattr(rank_batches, name)
