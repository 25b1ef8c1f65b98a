"""MedMNIST-style .npz files: arrays {train,val,test}_{images,labels}, uint8 pixels, official splits."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_shards.config import DataConfig
from data_shards.files import cached, local_copy
from data_shards.source import Row
from data_shards.split import SPLITS


class NpzSet:
    """The images of one .npz file; compressed arrays are unpacked once per machine, to be mapped into memory."""

    def __init__(self, config: DataConfig):
        self._path = local_copy(config.source)
        self.task: str = config.task
        self.notes: tuple[str, ...] = ()
        self.splits_from = ""
        labels = {split: _labels(self._path, split, config.task) for split in SPLITS}
        self.classes = config.classes or tuple(str(i) for i in range(_num_classes(labels.values())))
        self._images = {split: _images(self._path, split) for split in SPLITS}
        self.rows = []
        for split in SPLITS:
            images = self._images[split]
            if len(images) != len(labels[split]):
                raise ValueError(
                    f"{self._path.name} has {len(images)} {split}_images but {len(labels[split])} {split}_labels: "
                    "each image needs one row of labels, so write the file again"
                )
            for i, found in enumerate(labels[split]):
                self.rows.append(Row(f"{split}_images/{i}", 0, self._checked(found, split, i), split, None))

    def read(self, row: Row) -> np.ndarray:
        """uint8 (H, W) or (H, W, 3)."""
        array, _, index = row.where.partition("_images/")
        return np.asarray(self._images[array][int(index)])

    def _checked(self, labels: tuple[int, ...], split: str, index: int) -> tuple[int, ...]:
        bad = [label for label in labels if not 0 <= label < len(self.classes)]
        if bad:
            raise ValueError(
                f"label {bad[0]} at {split}_labels[{index}] of {self._path.name} is out of range: there are "
                f"{len(self.classes)} classes, so labels are 0 to {len(self.classes) - 1}; mend the file or "
                "--data.classes"
            )
        return labels


def _num_classes(labels_of_splits: Iterable[list[tuple[int, ...]]]) -> int:
    return 1 + max((label for labels in labels_of_splits for row in labels for label in row), default=-1)


def _labels(path: Path, split: str, task: str) -> list[tuple[int, ...]]:
    """Class indices of each row; the array is (n,), (n, 1), or multi-hot (n, classes) if the task is multilabel."""
    name = f"{split}_labels"
    with _archive(path) as archive:
        _header(archive, path, name)
        with _told_damage(path, name), archive.open(f"{name}.npy") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    if task == "multilabel":
        if values.ndim != 2 or not np.isin(values, (0, 1)).all():
            raise ValueError(
                f"{name} of {path.name} must hold 0 and 1 of shape (n, classes) for multilabel, not {values.shape}"
            )
        return [tuple(np.flatnonzero(row).tolist()) for row in values]
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(
            f"{name} of {path.name} has the shape {values.shape}, but one class per image is (n,) or (n, 1): write it "
            "so, or set --data.task multilabel"
        )
    if values.dtype.kind not in "iu":
        if values.dtype.kind != "f" or not (values == np.rint(values)).all():
            raise ValueError(f"{name} of {path.name} are {values.dtype}, but labels are whole numbers: write them so")
        values = values.astype(np.int64)
    return [(label,) for label in values.tolist()]


def _images(path: Path, split: str) -> np.ndarray:
    """The images as an array on disk, of which only what is read comes into memory."""
    name = f"{split}_images"
    with _archive(path) as archive:
        shape, dtype = _header(archive, path, name)
        if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
            raise ValueError(
                f"{name} of {path.name} are {dtype} {shape}, but images are uint8 (n, H, W) or (n, H, W, 3): write "
                "them so"
            )
        member = f"{name}.npy"
        stat = path.stat()
        identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{member}"
        key = f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}/{member}"

        def unpack(target: Path) -> None:
            with _told_damage(path, name), archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 22)

        unpacked = cached(key, unpack)
    with _told_damage(path, name):
        return np.load(unpacked, mmap_mode="r", allow_pickle=False)


# What zipfile, zlib and numpy raise on damaged bytes; RuntimeError where they seem to be encrypted.
_DAMAGE = (
    ValueError,
    EOFError,
    OSError,
    KeyError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise ValueError(f"{path} is no .npz file ({error}): get it again, or set --data.layout") from error


@contextlib.contextmanager
def _told_damage(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"array {name!r} of {path} is damaged ({error}): get the file again") from error


def _header(archive: zipfile.ZipFile, path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    names = [os.path.splitext(member)[0] for member in archive.namelist()]
    if name not in names:
        raise ValueError(
            f"{path.name} has no array {name!r} (it has {', '.join(names) or 'none'}): a MedMNIST-style file holds "
            "images and labels of train, val and test"
        )
    with _told_damage(path, name), archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        claimed, there = file.tell() + math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size
    if claimed != there and not dtype.hasobject:  # before so much memory is asked for
        raise ValueError(
            f"array {name!r} of {path} is damaged ({there} bytes, but its shape {shape} takes {claimed}): get the file "
            "again"
        )
    if dtype.hasobject:
        raise ValueError(
            f"array {name!r} of {path.name} holds Python objects, which are never unpickled: write numbers"
        )
    return shape, dtype
