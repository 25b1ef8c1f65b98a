"""Some images of each class side by side, for viewing: as stored in the shards, not as in the source."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from data_shards.decode import decode
from data_shards.manifest import Dataset
from data_shards.shard import tar_key

_GAP, _TEXT = 6, 16


def chosen(dataset: Dataset, split: str, *, per_class: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Each class with its first `per_class` images (H, W, C) of the split; a random sample, as shards are shuffled.

    Reads only the bytes of these images. A multilabel image appears under each of its classes.

    Raises:
        ValueError: the dataset has no such split.
        StoreError: a shard is missing.
    """
    index = dataset.index(split)
    for label, name in enumerate(dataset.manifest.classes):
        positions = np.flatnonzero(index.labels[:, label])[:per_class].tolist()
        yield name, [read_image(dataset, split, position) for position in positions]


def sheet(rows: list[tuple[str, list[np.ndarray]]], *, side: int = 96) -> Image.Image:
    """One row of images per class, below the class name; each image fits into `side` x `side` pixels."""
    columns = max((len(images) for _, images in rows), default=0)
    width = max(columns * (side + _GAP), 320) + _GAP
    height = len(rows) * (side + _TEXT + 2 * _GAP) + _GAP
    drawn = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(drawn)
    for line, (name, images) in enumerate(rows):
        top = _GAP + line * (side + _TEXT + 2 * _GAP)
        pen.text((_GAP, top), name.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, pixels in enumerate(images):
            image = fitted(pixels, side)
            left = _GAP + column * (side + _GAP) + (side - image.width) // 2
            drawn.paste(image, (left, top + _TEXT + _GAP + (side - image.height) // 2))
    return drawn


def fitted(pixels_HWC: np.ndarray, side: int) -> Image.Image:
    """The image as RGB, scaled to fit into `side` x `side`; small images are enlarged without interpolation."""
    image = Image.fromarray(pixels_HWC.repeat(3, 2) if pixels_HWC.shape[2] == 1 else pixels_HWC)
    scale = side / max(image.size)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)


def read_image(dataset: Dataset, split: str, position: int) -> np.ndarray:
    """The image (H, W, C) at a position of the split's index. StoreError if its shard is missing."""
    index = dataset.index(split)
    entry = dataset.manifest.shards[int(index.shard[position])]
    where = {"start": int(index.offset[position]), "length": int(index.size[position])}
    return decode(dataset.store.get(tar_key(entry.name), **where), examined=True)
