"""Opens the store of a URI."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_shards.store.folder import FileStore
from data_shards.store.outage import PATIENCE_S
from data_shards.store.store import Store, StoreError


def open_store(uri: str, *, patience_s: float = PATIENCE_S) -> Store:
    """The store in a folder ('./x', '/x', 'file:///x') or at 's3://bucket/prefix'. Accesses neither disk nor network.

    `patience_s` is how long each read and write waits for an unreachable server (see `Store`). Raises StoreError if
    `uri` is invalid.
    """
    uri = str(uri)
    if uri.startswith("s3://"):
        from data_shards.store.s3.store import S3Store  # lazy: imports boto3, which is slow

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise StoreError(f"{uri!r} has no bucket; write s3://bucket/prefix")
        return S3Store(bucket, "/".join(part for part in prefix.split("/") if part), patience_s=patience_s)
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise StoreError(f"{uri!r} names another host or no folder; write file:///folder with three slashes")
        uri = unquote(parts.path)
    if not uri or "://" in uri:
        raise StoreError(f"{uri!r} is not a store; use a folder or s3://bucket/prefix")
    return FileStore(Path(os.path.abspath(os.path.expanduser(uri))))
