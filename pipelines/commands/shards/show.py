"""The command shards show: shows images of each class, as a contact sheet and in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

from data_shards.contact_sheet import chosen, fitted, sheet
from data_shards.manifest import open_dataset
from pipelines.commands.shards.owner import dataset_in
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, StoreOption
from pipelines.console.terminal import console, table
from pipelines.wording import counted

_SHOWN_SIDE = 16  # pixels, and so columns, of an image in the terminal


@dataclass(frozen=True)
class ShowArguments(StoreOption):
    """Arguments of `shards show`."""

    dataset: tyro.conf.Positional[str] = ""
    """DATASET or DATASET/NAME in the store. Empty: the only one."""
    split: str = "train"
    """train, val or test."""
    per_class: int = 8
    """Images per class."""
    out: str = ""
    """PNG file to write. Empty: contact-sheet.png in the current folder."""


def show(asked: ShowArguments) -> int:
    """Writes the contact sheet, draws images where standard output is a terminal, and prints the counts."""
    if asked.per_class < 1:
        raise UsageError(f"shards show: --per-class {asked.per_class}: give at least 1")
    path = Path(asked.out or "contact-sheet.png")
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise UsageError(f"shards show: --out {path}: give a .png file in an existing folder")
    dataset = open_dataset(dataset_in(asked.open_store(), asked.dataset))
    try:
        rows = list(chosen(dataset, asked.split, per_class=asked.per_class))
    except ValueError as error:
        raise UsageError(f"shards show: {error}") from None
    sheet(rows).save(path)
    screen = console()
    if screen.is_terminal:
        fit = max(1, screen.width // (_SHOWN_SIDE + 1))
        for label, images in rows:
            screen.print(label)
            screen.print(_blocks([fitted(pixels, _SHOWN_SIDE) for pixels in images[:fit]]))
    counts = dataset.manifest.splits[asked.split].classes
    table(asked.split, ("class", "images"), [(label, f"{n:,}") for label, n in counts.items()])
    num = sum(len(images) for _, images in rows)
    screen.print(f"wrote {counted(num, 'image')} of {dataset.store.uri} to {path}", soft_wrap=True)
    return 0


def _blocks(images: list[Image.Image]) -> Text:
    """Images side by side, as characters that show two pixels each, one above the other."""
    strip = np.zeros((_SHOWN_SIDE, len(images) * (_SHOWN_SIDE + 1), 3), np.uint8)
    for place, image in enumerate(images):
        left = place * (_SHOWN_SIDE + 1)
        strip[: image.height, left : left + image.width] = np.asarray(image)
    drawn = Text()
    for upper, lower in zip(strip[::2], strip[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            drawn.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        drawn.append("\n")
    return drawn


SHOW = Command(
    "shards show", "Show images of each class: as a PNG contact sheet, and in the terminal.", ShowArguments, show
)
