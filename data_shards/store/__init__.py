"""One interface to folders and S3, with leases, outages of services and full disks."""

from data_shards.store.folder import FileStore
from data_shards.store.open import open_store
from data_shards.store.store import (
    Store,
    StoreAwayError,
    StoreError,
    StoreFullError,
    StoreKeyError,
    StorePathError,
    checked_key,
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
