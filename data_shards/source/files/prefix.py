"""The objects below an s3:// prefix as files."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from data_shards.source.files.cache import LocalFile, local_file
from data_shards.source.files.files import Files, with_parents
from data_shards.source.files.litter import left_out, note_of
from data_shards.source.files.ranged_file import RangedFile
from data_shards.store import StoreError

if TYPE_CHECKING:
    from data_shards.store.s3.store import S3Store


@dataclass(frozen=True)
class StoreReader:
    """Reads the objects of a store."""

    store: S3Store

    def read(self, name: str, place: str | None) -> bytes:
        """The complete object."""
        return self.store.get(name)

    def open(self, name: str, place: str | None, *, buffer_bytes: int) -> BinaryIO:
        """The object, fetched on demand."""
        parts = RangedFile(functools.partial(self._part, name), functools.partial(self._size, name))
        return io.BufferedReader(parts, buffer_bytes)

    def stamp(self, name: str, place: str | None) -> str:
        """See FileReader."""
        return f"{self.store.uri}/{name}|{place}" if place else ""

    def _part(self, name: str, start: int, length: int) -> bytes:
        return self.store.get(name, start=start, length=length)

    def _size(self, name: str) -> int:
        size = self.store.head(name)
        if size is None:
            raise StoreError(f"{self.store.uri}/{name} was deleted after it was listed; rerun the command")
        return size


class StoreFiles(Files):
    """The objects below an s3:// prefix, fetched when read."""

    def __init__(self, store: S3Store):
        self._store, self.reader = store, StoreReader(store)
        tags, litter = {}, set()
        for key, tag in store.raw_tags():
            if outside := left_out(key, folder=key.endswith("/")):
                litter.add(outside)
            else:
                tags[key] = tag
        keys = list(tags)
        self.notes = note_of(litter)
        self.broken: dict[str, str] = {}
        self.names = [key for key in keys if key and not key.endswith("/")]
        self._tags = {name: tags[name] for name in self.names}
        if not self.names:
            raise ValueError(f"{store.uri} was not found: no object has this key; check --data.source")
        self.folders = with_parents([key.rstrip("/") for key in keys if key.endswith("/")], self.names)

    def place(self, name: str) -> str | None:
        """See Files: the object's ETag when the prefix was listed."""
        return self._tags[name]

    def local(self, name: str) -> LocalFile:
        """See Files."""
        return local_file(f"{self._store.uri}/{name}")
