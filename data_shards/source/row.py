"""What a source gives: an image set, its rows, and what reads the image of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Row:
    """One image. `where` is its path inside the set; `labels` are class indices; unknown split and group are None."""

    where: str
    frame: int
    labels: tuple[int, ...]
    split: str | None
    group: str | None


class ImageSet(Protocol):
    """What a source gives: its rows in an order that depends on the set alone, and the image of each."""

    classes: tuple[str, ...]
    task: str
    notes: tuple[str, ...]
    """What its owner should be told of it, a sentence each: file names may stand there."""
    splits_from: str
    """Where its splits come from, in a clause without file names; empty where there is nothing to say."""

    @property
    def rows(self) -> list[Row]: ...

    def read(self, row: Row) -> bytes | np.ndarray:
        """The image: coded bytes, or uint8 pixels (H, W) or (H, W, C)."""
        ...

    def inside(self, row: Row) -> str:
        """Where the row's file is inside the source, as its owner finds it there."""
        ...

    def stamp(self, row: Row) -> str:
        """A text that changes when the row's file is replaced, found without reading it; "" where that is unknown."""
        ...
