"""The inputs of a prediction as a user writes them -> the images that they name, in a stable order.

Names are listed at once, so that a wrong one is an error before a model is loaded; contents are read one by one.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from data_shards.loader.local_shard import LocalShards
from data_shards.manifest import ManifestError, open_dataset
from data_shards.source.files.files import Files
from data_shards.source.files.folder import FolderFiles, FolderReader
from data_shards.source.files.litter import named_note
from data_shards.source.files.open import open_files
from data_shards.source.files.prefix import StoreFiles, StoreReader
from data_shards.source.folders.tree import may_be_image
from data_shards.split import SPLITS
from data_shards.store import Store, StoreError, open_store
from pipelines.console.arguments import UsageError
from pipelines.predict.source import FileSource, ImageSource, Item, SplitSource, Unreadable

if TYPE_CHECKING:
    from data_shards.store.s3.store import S3Store

NOTHING = "predict: give at least one image file, folder, .tar, .zip, s3://bucket/prefix or DATASET:SPLIT"
_ARCHIVES = (".tar", ".zip")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
# Besides documents: labels in tars of shards, and arrays, tables and checksums.
_NOT_IMAGES = {".cls", ".npz", ".npy", ".parquet", ".md5", ".sha256", ".tar", ".gz"}


@dataclass
class Inputs:
    """What a command line names. `num_files` counts files and samples, not the frames in them."""

    parts: list[Iterator[Item]] = field(default_factory=list)
    num_files: int = 0
    skipped: list[str] = field(default_factory=list)
    """Files in folders and archives that are not images by their name."""
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Item]:
        """The images; can be iterated once."""
        for part in self.parts:
            yield from part

    def add(self, part: Iterator[Item], num: int) -> None:
        """Adds files that are named by an iterator, and their number."""
        self.parts.append(part)
        self.num_files += num

    def add_one(self, name: str, source: ImageSource, where: object) -> None:
        """Adds one file."""
        self.add(iter([Item(name, source, where)]), 1)

    def messages(self) -> list[str]:
        """What a user should know about files that are left out, one line each."""
        what = "file is not an image by its name and is skipped"
        if len(self.skipped) > 1:
            what = "files are not images by their names and are skipped"
        return [*self.notes, *named_note(what, self.skipped, len(self.skipped))]


def open_inputs(words: Sequence[str], *, dataset: Callable[[str], Store]) -> Inputs:
    """Lists the images that `words` name; `dataset` returns the folder of a dataset in the store.

    A word is a file, a folder, a .tar or .zip, s3://bucket/key, s3://bucket/prefix, or DATASET[/NAME]:SPLIT. What is
    there but cannot be opened becomes an image that cannot be read.

    Raises:
        UsageError: nothing has this name.
        StoreError: an S3 server refuses, or does not answer.
    """
    if not words:
        raise UsageError(NOTHING)
    found = Inputs()
    for word in words:
        if word.startswith("s3://"):
            _add_s3(found, word)
        elif os.path.lexists(word):
            _add_path(found, word)
        elif word.rpartition(":")[2] in SPLITS and word.rpartition(":")[0]:
            _add_split(found, word, dataset)
        else:
            raise UsageError(
                f"predict: {word} was not found; give an image file, a folder, a .tar or .zip, s3://bucket/prefix, "
                f"or DATASET:SPLIT (splits: {', '.join(SPLITS)})"
            )
    return found


def _add_path(found: Inputs, word: str) -> None:
    path = Path(word)
    if path.is_dir():
        _add_opened(found, word, lambda: FolderFiles(path))
    elif word.lower().endswith(_ARCHIVES):
        _add_opened(found, word, lambda: open_files(word))
    elif word.lower().endswith(_COMPRESSED):
        found.add_one(word, Unreadable(), "a compressed archive; unpack it to a folder or a .tar")
    elif path.exists() and not path.is_file():  # reading a pipe would never end
        found.add_one(word, Unreadable(), "not a regular file")
    else:
        folder, name = os.path.split(word)
        found.add_one(word, FileSource(FolderReader(Path(folder))), (name, None))


def _add_s3(found: Inputs, word: str) -> None:
    prefix = open_store(word)
    prefix.reach()
    parent, _, name = word.rpartition("/")
    if name and not parent.endswith(("s3:", "s3:/")):
        store = open_store(parent)
        if store.head(name) is not None:
            if name.lower().endswith(_ARCHIVES):
                _add_opened(found, word, lambda: open_files(word))
            else:
                found.add_one(word, FileSource(StoreReader(cast("S3Store", store))), (name, None))
            return
    try:
        files = StoreFiles(cast("S3Store", prefix))
    except StoreError:
        raise
    except ValueError:
        raise UsageError(f"predict: {word} was not found: no object has this key or prefix") from None
    _add_files(found, word, files)


def _add_split(found: Inputs, word: str, dataset: Callable[[str], Store]) -> None:
    name, _, split = word.rpartition(":")
    try:
        opened = open_dataset(dataset(name))
        index = opened.index(split)
    except (UsageError, ManifestError):
        raise
    except ValueError as error:
        raise UsageError(f"predict: {word}: {error}") from error
    shards = LocalShards([(opened.store, entry) for entry in opened.manifest.shards])
    source = SplitSource(shards, index)
    found.add((Item(str(key), source, where) for where, key in enumerate(index.key)), len(index))


def _add_opened(found: Inputs, called: str, open_them: Callable[[], Files]) -> None:
    """Adds the files of a folder or an archive; one image that cannot be read if it cannot be opened."""
    try:
        files = open_them()
    except StoreError:
        raise
    except (ValueError, OSError) as error:
        found.add_one(called, Unreadable(), str(error))
        return
    _add_files(found, called, files)


def _add_files(found: Inputs, called: str, files: Files) -> None:
    found.notes += [f"{called}: {note}" for note in files.notes]
    base, source = called.rstrip("/") or "/", FileSource(files.reader)
    names, has_archives = [], isinstance(files, FolderFiles | StoreFiles)
    for name in files.names:
        if has_archives and name.lower().endswith(_ARCHIVES):
            # Opened apart, so that a damaged one does not hide the other files.
            where = posixpath.join(base, name)
            _add_opened(found, where, functools.partial(open_files, where))
        elif may_be_image(name) and posixpath.splitext(name)[1].lower() not in _NOT_IMAGES:
            names.append(name)
        else:
            found.skipped.append(name)
    if not names and not files.names:
        found.add_one(called, Unreadable(), "a folder or archive without files")
    found.add((Item(posixpath.join(base, name), source, (name, files.place(name))) for name in names), len(names))
