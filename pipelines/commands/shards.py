"""`medmamba shards`: a dataset verified, looked at, and asked for duplicates, quarantine and files."""

from __future__ import annotations

import json as json_
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

from data_shards.contact_sheet import chosen, fitted, sheet
from data_shards.manifest import MAKE_AGAIN, MANIFEST, open_dataset
from data_shards.store import Store
from data_shards.verify import verify
from pipelines.commands.arguments import UsageError, parse
from pipelines.commands.shard_leaks import leaks
from pipelines.commands.shard_names import dataset_in, names, quarantine
from pipelines.commands.terminal import Terminal, console, table

Flag = tyro.conf.FlagCreatePairsOff[bool]
_SHOWN_SIDE = 16  # pixels, which are columns, of an image in the terminal


def shards(argv: Sequence[str], *, open_at: Callable[[str], Store]) -> int:
    """Look at a dataset: verify, show, duplicates, quarantine, file names."""
    verbs = {"verify": _verify, "show": _show, "leaks": leaks, "quarantine": quarantine, "names": names}
    if not argv or argv[0] in ("-h", "--help"):
        console().print(f"usage: medmamba shards {{{','.join(verbs)}}}")
        console().print("           [DATASET[/NAME]] [--store STORE] [--help]\n")
        for name, verb in verbs.items():
            for i, line in enumerate(textwrap.wrap((verb.__doc__ or "").splitlines()[0], 66)):
                console().print(f"  {'' if i else name:<11} {line}")
        return 0
    if argv[0] not in verbs:
        raise UsageError(f"shards: there is no {argv[0]!r}: choose {', '.join(verbs)}")
    return verbs[argv[0]](argv[1:], open_at)


def _verify(argv: Sequence[str], open_at: Callable[[str], Store]) -> int:
    """Read every byte of a dataset again and hold it to its manifest; exit code 1 where something is wrong."""

    name, uri, as_json = _asked("shards verify", _verify, argv)
    out = dataset_in(open_at(uri), name)
    from pipelines.cluster import ray_session
    from pipelines.steps.shard import ray_map

    terminal = Terminal()
    terminal.say("connecting to Ray")
    ray_session.connect()

    def progress(done: int, total: int, unit: str) -> None:
        terminal.progress("verify", {"done": done, "total": total, "unit": unit})

    try:
        found = verify(out, run_tasks=ray_map, progress=progress)
    finally:
        terminal.close()
    if as_json:
        print(json_.dumps(asdict(found), indent=2))
        return 1 if found.problems else 0
    for problem in found.problems:
        console().print(f"wrong: {problem}")
    for stray in found.strays:
        console().print(f"none of the dataset's (nothing reads it, it may be deleted): {stray}")
    verdict = f"{len(found.problems)} problems" if found.problems else "as the manifest says"
    console().print(
        f"{out.uri}: {found.shards:,} shards, {found.samples:,} samples, {found.bytes / 1e6:,.0f} MB read: {verdict}"
    )
    if found.shards and found.problems:
        console().print(f"To mend it, delete the shards that are named, and {MANIFEST}, {MAKE_AGAIN}.")
    return 1 if found.problems else 0


def _show(argv: Sequence[str], open_at: Callable[[str], Store]) -> int:
    """Draw images of each class: a contact sheet as a PNG, and in the terminal."""

    def arguments(
        dataset: tyro.conf.Positional[str] = "",
        split: str = "train",
        per_class: int = 8,
        out: str = "",
        store: str = "",
    ) -> tuple[str, str, int, str, str]:
        """Draw images of each class: a contact sheet as a PNG, and in the terminal.

        Args:
            dataset: DATASET or DATASET/NAME, as under datasets/ in the store; empty: the only one there.
            split: train, val or test.
            per_class: Images of each class.
            out: PNG to write; empty: contact-sheet.png in this folder.
            store: Folder or s3://bucket/prefix; empty: $MEDMAMBA_STORE, else ./medmamba-store.
        """
        return dataset, split, per_class, out, store

    name, split, per_class, target, uri = parse(arguments, "shards show", argv)
    if per_class < 1:
        raise UsageError(f"shards show: --per-class {per_class}: a sheet needs at least 1")
    path = Path(target or "contact-sheet.png")
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise UsageError(f"shards show: --out {path}: give a .png in a folder that exists")
    dataset = open_dataset(dataset_in(open_at(uri), name))
    try:
        rows = list(chosen(dataset, split, per_class=per_class))
    except ValueError as error:
        raise UsageError(f"shards show: {error}") from None
    sheet(rows).save(path)
    screen = console()
    if screen.is_terminal:
        fit = max(1, screen.width // (_SHOWN_SIDE + 1))
        for label, images in rows:
            screen.print(label)
            screen.print(_blocks([fitted(pixels, _SHOWN_SIDE) for pixels in images[:fit]]))
    counts = dataset.manifest.splits[split].classes
    table(split, ("class", "images"), [(label, f"{n:,}") for label, n in counts.items()])
    screen.print(
        f"{sum(len(images) for _, images in rows)} images of {dataset.store.uri} are in {path}", soft_wrap=True
    )
    return 0


def _asked(verb: str, described: Callable, argv: Sequence[str]) -> tuple[str, str, bool]:
    """Dataset, store, and whether JSON is wanted: what the verbs take that only read and tell."""

    def arguments(
        dataset: tyro.conf.Positional[str] = "", store: str = "", json: Flag = False
    ) -> tuple[str, str, bool]:
        """What a verb takes.

        Args:
            dataset: DATASET or DATASET/NAME, as under datasets/ in the store; empty: the only one there.
            store: Folder or s3://bucket/prefix; empty: $MEDMAMBA_STORE, else ./medmamba-store.
            json: Print JSON.
        """
        return dataset, store, json

    return parse(arguments, verb, argv, description=described.__doc__)


def _blocks(images: list[Image.Image]) -> Text:
    """Images side by side as characters: each shows two pixels, one above the other."""
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
