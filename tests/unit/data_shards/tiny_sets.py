"""Small image sets of odd sizes for the tests of what happens to an image after it was found."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_shards.config import DataConfig
from data_shards.source import Row


@dataclass
class InMemorySet:
    """Images by their path: an image set and its own reader."""

    rows: list[Row]
    images: dict[str, np.ndarray | bytes]
    classes: tuple[str, ...] = ("a", "b")
    task: str = "multiclass"
    notes: tuple[str, ...] = ()
    splits_from: str = ""
    reads: list[str] = field(default_factory=list)

    @property
    def reader(self) -> InMemorySet:
        return self

    def read(self, row: Row) -> np.ndarray | bytes:
        self.reads.append(row.where)
        return self.images[row.where]

    def inside(self, row: Row) -> str:
        return row.where

    def stamp(self, row: Row) -> str:
        return ""


def pixels(number: int, height: int = 12, width: int = 15, channels: int = 1) -> np.ndarray:
    """A noise image that is unlike any other number's."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def coded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def in_memory_set(num: int = 10) -> InMemorySet:
    """Arrays, PNG and JPEG, grey and RGB, each of another size, of two classes and groups of two."""
    rows, images = [], {}
    for i in range(num):
        where = f"folder {i % 2}/image ({i}).x"
        image = pixels(i, 9 + i, 20 - i % 7, channels=3 if i % 3 == 0 else 1)
        images[where] = [image, coded(image), coded(image, "JPEG")][i % 3]
        rows.append(Row(where=where, frame=0, labels=(i % 2,), split=None, group=f"patient {i // 2}"))
    return InMemorySet(rows, images)


def npz_config(folder: Path, *, num: dict[str, int] | None = None, side: int = 12, **changes) -> DataConfig:
    """The config of a new set in a MedMNIST-style npz: three classes in turn, images of noise."""
    num = num or {"train": 50, "val": 9, "test": 14}
    arrays = {}
    for position, (split, count) in enumerate(num.items()):
        arrays[f"{split}_images"] = np.stack([pixels(1000 * position + i, side, side) for i in range(count)])
        arrays[f"{split}_labels"] = (np.arange(count) % 3).astype(np.uint8)[:, None]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "tiny.npz", **arrays)
    settings = {"dataset": "tiny", "layout": "npz", "source": str(folder / "tiny.npz"), "samples_per_shard": 8}
    return DataConfig(**{**settings, **changes})
