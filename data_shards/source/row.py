"""What a source gives: an image set, its rows, and the reader of their images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Row:
    """One image. `where` is its path inside the set; `labels` are class indices; unknown split and group are None."""

    where: str
    frame: int
    labels: tuple[int, ...]
    split: str | None
    group: str | None
    place: Any = field(default=None, compare=False, repr=False)
    """What the set's own reader needs to find the image, such as an offset in an archive; it can be pickled."""


class Reader(Protocol):
    """Reads the images of rows. It can be pickled, for any process on any machine, and holds nothing per row."""

    def read(self, row: Row) -> bytes | np.ndarray:
        """The image: coded bytes, or uint8 pixels (H, W) or (H, W, C). UndecodableImage where there are none."""
        ...

    def inside(self, row: Row) -> str:
        """Where the row's file is inside the source, as its owner finds it there."""
        ...

    def stamp(self, row: Row) -> str:
        """A text that changes when the row's file is replaced, found without reading it; "" where that is unknown."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """The rows of a source, in an order that depends on the set alone, and how the image of each is read."""

    rows: list[Row]
    classes: tuple[str, ...]
    task: str
    notes: tuple[str, ...]
    """What its owner should know, a sentence each: they may hold file names."""
    reader: Reader
    splits_from: str = ""
    """Where its splits come from, in a clause without file names; empty where there is nothing to say."""
