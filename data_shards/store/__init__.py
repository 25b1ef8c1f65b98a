"""One seam to a folder and to S3, and what goes with it: leases, services that are away, full disks."""

from data_shards.store.store import (
    FileStore,
    Store,
    StoreAwayError,
    StoreError,
    StoreFullError,
    StoreKeyError,
    StorePathError,
    checked_key,
    open_store,
)

__all__ = [
    "FileStore",
    "Store",
    "StoreAwayError",
    "StoreError",
    "StoreFullError",
    "StoreKeyError",
    "StorePathError",
    "checked_key",
    "open_store",
]
