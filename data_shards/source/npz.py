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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_shards.config import DataConfig
from data_shards.source.files.cache import LocalFile, cached, copy_stamp, local_file
from data_shards.source.labels import relabelled
from data_shards.source.row import ImageSet, Row
from data_shards.split import SPLITS


class NpzReader:
    """Reads the images of one .npz file; arrays are unpacked once per machine and mapped into memory."""

    def __init__(self, file: LocalFile, stamp: str):
        self._file, self._stamp = file, stamp
        self._arrays: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}  # a mapped array would be pickled with all its pixels

    def array(self, split: str) -> np.ndarray:
        """The images of a split, (n, H, W) or (n, H, W, C). ValueError if they are damaged."""
        if split not in self._arrays:
            self._arrays[split] = _images(self._file.path(), split)
        return self._arrays[split]

    def read(self, row: Row) -> np.ndarray:
        """uint8 (H, W) or (H, W, 3)."""
        split, _, index = row.where.partition("_images/")
        return np.ascontiguousarray(self.array(split)[int(index)])

    def inside(self, row: Row) -> str:
        """See Reader: the array and the image's place in it."""
        return row.where

    def stamp(self, row: Row) -> str:
        """See Reader: the stamp of the .npz file, which can only be replaced as a unit."""
        return f"{self._stamp}|{row.where}" if self._stamp else ""


def open_npz(config: DataConfig) -> ImageSet:
    """The images of one .npz file in MedMNIST's layout. ValueError if it is damaged or has another layout."""
    file = local_file(config.source)
    path = file.path()
    reader = NpzReader(file, copy_stamp(config.source, path))
    splits, notes = _splits_there(path)
    labels = {split: _labels(path, split, config.task) for split in splits}
    if any(of_split.one_hot for of_split in labels.values()):
        notes.append(f"labels of {path.name} are one-hot: each row's column with the 1 is its class")
    classes = _index_names(config) or _numbered_classes(path, labels)
    rows = []
    for split in splits:
        indices, num_images = labels[split].indices, len(reader.array(split))
        if num_images != len(indices):
            raise ValueError(
                f"{path.name} has {num_images} {split}_images but {len(indices)} {split}_labels; write one row of "
                "labels per image"
            )
        for i, found in enumerate(indices):
            _check_range(found, len(classes), f"{split}_labels[{i}] of {path.name}")
            rows.append(Row(f"{split}_images/{i}", 0, found, split, None))
    made = relabelled(rows, classes, config, path.name)
    return ImageSet(made.rows, made.classes, config.task, (*notes, *made.notes), reader)


def _check_range(labels: tuple[int, ...], num_classes: int, at: str) -> None:
    bad = [label for label in labels if not 0 <= label < num_classes]
    if bad:
        raise ValueError(
            f"label {bad[0]} at {at} is out of range: with {num_classes} classes, labels are 0 to {num_classes - 1}; "
            "fix the file or --data.classes"
        )


class _Labels(NamedTuple):
    """Class indices of each row, and whether they were one-hot."""

    indices: list[tuple[int, ...]]
    one_hot: bool = False


def _index_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the label indices: from --data.classes, or numbers for indices that --data.class-map renames."""
    renamed = {pair.rpartition("=")[0].strip() for pair in config.class_map}
    if not config.classes or any(name.isdecimal() for name in config.classes):
        return config.classes
    numbers = [int(name) for name in renamed if name.isdecimal() and len(name) < 7]
    num_classes = len(config.classes)
    while num_classes in numbers:
        num_classes += 1
    return tuple(str(i) if str(i) in renamed else config.classes[i] for i in range(num_classes))


def _splits_there(path: Path) -> tuple[tuple[str, ...], list[str]]:
    """The splits in the file, all three or train and test, and a note in the latter case."""
    with _archive(path) as archive:
        there = {os.path.splitext(member)[0] for member in archive.namelist()}
    present = [split for split in SPLITS if {f"{split}_images", f"{split}_labels"} & there]
    if present != ["train", "test"]:
        return SPLITS, []
    return ("train", "test"), [f"{path.name} has no val arrays: validation is drawn from train"]


def _numbered_classes(path: Path, labels: Mapping[str, _Labels]) -> tuple[str, ...]:
    """Numbers as class names. ValueError if there are more classes than images, so that some have none."""
    found = (label for of_split in labels.values() for row in of_split.indices for label in row)
    num_classes = 1 + max(found, default=-1)
    num_images = sum(len(of_split.indices) for of_split in labels.values())
    if num_classes > num_images:
        raise ValueError(
            f"labels of {path.name} go up to {num_classes - 1}, but it has only {num_images} images; number the "
            "classes 0, 1, 2 and so on, with images for each"
        )
    return tuple(str(i) for i in range(num_classes))


def _labels(path: Path, split: str, task: str) -> _Labels:
    """The labels: (n,) or (n, 1) with indices, or (n, classes), multi-hot if multilabel, else one-hot.

    Accepts booleans, integers and integer-valued floats in any byte order.
    """
    name = f"{split}_labels"
    with _archive(path) as archive:
        _header(archive, path, name)
        with _damage_explained(path, name), archive.open(f"{name}.npy") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    if values.dtype.kind not in "biuf" or not (np.isfinite(values) & (values == np.rint(values))).all():
        raise ValueError(f"{name} of {path.name} are {values.dtype}, but labels must be integers; write integers")
    indicators = values.ndim == 2 and np.isin(values, (0, 1)).all()
    if task == "multilabel":
        if not indicators:
            raise ValueError(
                f"{name} of {path.name} must hold 0 and 1 of shape (n, classes) for multilabel, not {values.shape}"
            )
        return _Labels([tuple(np.flatnonzero(row).tolist()) for row in values])
    one_hot = bool(indicators and values.shape[1] > 1 and (values.sum(axis=1) == 1).all())
    if one_hot:
        return _Labels([(label,) for label in values.argmax(axis=1).tolist()], one_hot=True)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(
            f"{name} of {path.name} has the shape {values.shape}, but for one class per image it must be (n,), (n, 1), "
            "or (n, classes) with a single 1 in each row; reshape it, or set --data.task multilabel"
        )
    return _Labels([(int(label),) for label in values.tolist()])


def _images(path: Path, split: str) -> np.ndarray:
    """The images as a memory-mapped array."""
    name = f"{split}_images"
    with _archive(path) as archive:
        shape, dtype = _header(archive, path, name)
        if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
            raise ValueError(
                f"{name} of {path.name} are {dtype} {shape}, but images must be uint8 (n, H, W) or (n, H, W, 3); "
                "convert them"
            )
        member = f"{name}.npy"
        stat = path.stat()
        identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{member}"
        key = f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}/{member}"

        def unpack(target: Path) -> None:
            with _damage_explained(path, name), archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 22)

        unpacked = cached(key, unpack)
    with _damage_explained(path, name):
        images: np.ndarray = np.load(unpacked, mmap_mode="r", allow_pickle=False)
    return images


# What zipfile, zlib and numpy raise on damaged bytes; RuntimeError if they seem to be encrypted.
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
        raise ValueError(f"{path} is not an .npz file ({error}); download it again, or set --data.layout") from error


@contextlib.contextmanager
def _damage_explained(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"array {name!r} of {path} is damaged ({error}); download the file again") from error


def _header(archive: zipfile.ZipFile, path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    names = [os.path.splitext(member)[0] for member in archive.namelist()]
    if name not in names:
        raise ValueError(
            f"{path.name} has no array {name!r} (it has {', '.join(names) or 'none'}); a MedMNIST-style file needs "
            "images and labels of train, val and test, or of train and test"
        )
    with _damage_explained(path, name), archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        claimed, there = file.tell() + math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size
    if claimed != there and not dtype.hasobject:  # checked before the memory is allocated
        raise ValueError(
            f"array {name!r} of {path} is damaged ({there} bytes, but its shape {shape} takes {claimed}); download the "
            "file again"
        )
    if dtype.hasobject:
        raise ValueError(
            f"array {name!r} of {path.name} contains Python objects, which are never unpickled; write numbers"
        )
    return shape, dtype
