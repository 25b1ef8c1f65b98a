"""An image set, its rows, and the reader of their images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Row:
    """One image. `where` is its path inside the set, `labels` are class indices; split and group may be unknown."""

    where: str
    frame: int
    labels: tuple[int, ...]
    split: str | None
    group: str | None
    place: Any = field(default=None, compare=False, repr=False)
    """Data with which the set's reader finds the image, such as an offset in an archive; picklable."""
    metadata: tuple[int | float | str | None, ...] = field(default=(), compare=False, repr=False)
    """The values of `data.metadata_columns`; None where one is missing."""


class Reader(Protocol):
    """Reads the images of rows. Picklable for any process on any machine; holds nothing per row."""

    def read(self, row: Row) -> bytes | np.ndarray:
        """The image: encoded bytes, or uint8 pixels (H, W) or (H, W, C). UndecodableImage if it cannot be read."""
        ...

    def inside(self, row: Row) -> str:
        """The path of the row's file inside the source, for messages to the user."""
        ...

    def stamp(self, row: Row) -> str:
        """A text that changes when the row's file is replaced, found without reading it; "" if unknown."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """The rows of a source, in an order that depends only on the set, and the reader of their images."""

    rows: list[Row]
    classes: tuple[str, ...]
    task: str
    notes: tuple[str, ...]
    """Messages for the user, one sentence each; they may contain file names."""
    reader: Reader
    splits_from: str = ""
    """Origin of the splits, as a clause without file names; may be empty."""
