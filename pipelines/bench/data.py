"""`medmamba bench data`: the speed of conversion and loading, compared with alternatives; as tables and JSON."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from pipelines.bench.conversion import WRITERS
from pipelines.bench.feed import KINDS, feed_table
from pipelines.bench.loading import LOADERS
from pipelines.bench.timed_process import CONVERSION, FEED, TimedProcess
from pipelines.bench.work import Work, make_images, save_work
from pipelines.console.arguments import UsageError, parse
from pipelines.console.terminal import Terminal, console, table
from pipelines.scratch import scratch


@dataclass(frozen=True)
class DataArguments:
    """Measure conversion into shards and loading from them, compared with alternatives.

    The images are generated. JPEGs of 512 px are randomly cropped to 224 px, PNGs of 28 px stay uncropped. Each loader
    and writer runs in its own process with the same number of workers; one that loses, repeats or alters an image gets
    no speed.
    """

    images: int = 2048
    """JPEGs of 512 px; 0: skip them. Must be a multiple of the batch."""
    small_images: int = 20480
    """PNGs of 28 px; 0: skip them. Must be a multiple of the batch."""
    min_area: float = 0.08
    """Least share of a JPEG's area that a random crop covers."""
    batch: int = 64
    """Images per batch."""
    workers: int = 2
    """Processes per loader or writer."""
    repeats: int = 3
    """Timed epochs, of which the median counts; an epoch before them starts the workers and is checked."""
    loaders: tuple[str, ...] = ()
    """Loaders to measure; empty: all."""
    writers: tuple[str, ...] = ()
    """Writers to measure; empty: all."""
    only: Literal["", "loading", "conversion"] = ""
    """Measure only loading or only conversion."""
    sides: tuple[int, ...] = ()
    """Sides in pixels. If given, only this project's loader is measured, feeding a GPU if there is one: PNGs and JPEGs
    of each side, uncropped (decoded in each epoch, or cached) and randomly cropped."""
    out: str = ""
    """File for the figures as JSON."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of tables."""


def bench_data(argv: Sequence[str]) -> int:
    """Measure conversion and loading on this machine."""
    args = parse(DataArguments, "bench data", argv)
    _check(args)
    if args.sides:
        return _show_feed(args)
    figures: dict[str, Any] = {"workers": args.workers, "loading": [], "conversion": []}
    for title, work, num_bytes in _works(args):
        if args.only != "conversion":
            figures["loading"] += _loading(args.loaders or tuple(LOADERS), title, work, num_bytes)
        if args.only != "loading":
            figures["conversion"] += _conversion(args.writers or tuple(WRITERS), title, work, num_bytes)
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2) + "\n")
    if args.json:
        print(json.dumps(figures, indent=2))
        return 0
    for half, rows in (("Loading", figures["loading"]), ("Conversion", figures["conversion"])):
        for title in dict.fromkeys(row["images"] for row in rows):
            table(f"{half}: {title}, {args.workers} workers", *speed_table(rows, title))
        for row in rows:
            if "why_not" in row:
                console().print(f"{half}, {row['by']}, {row['images']}: not measured: {row['why_not']}")
    return 0


def _show_feed(args: DataArguments) -> int:
    rows = [row for title, work, num_bytes in _feed_works(args) for row in _feeding(title, work, num_bytes)]
    figures = {"workers": args.workers, "batch": args.batch, "feed": rows}
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2) + "\n")
    if args.json:
        print(json.dumps(figures, indent=2))
        return 0
    table(f"Feed: {args.workers} workers, batches of {args.batch}", *feed_table(rows))
    for row in rows:
        if "why_not" in row:
            console().print(f"{row['images']}, {row['by']}: not measured: {row['why_not']}")
    return 0


def speed_table(rows: Sequence[dict[str, Any]], title: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table of loaders or writers, for the rows whose images are `title`."""
    columns = ("by", "images/s", "MB/s", "processor s\nper 1,000", "peak\nGiB", "this project\nis faster by")
    measured = [row for row in rows if row["images"] == title and "why_not" not in row]
    return columns, [
        (
            row["by"],
            f"{row['images_per_s']:,.0f}",
            f"{row['mb_per_s']:,.1f}",
            f"{row['processor_s_per_1000']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{measured[0]['images_per_s'] / row['images_per_s']:.2f}" if measured[0]["by"] == "medmamba" else "",
        )
        for row in measured
    ]


def _check(asked: DataArguments) -> None:
    for name, least in (("images", 0), ("small_images", 0), ("batch", 1), ("workers", 1), ("repeats", 1)):
        if getattr(asked, name) < least:
            raise UsageError(f"bench data: --{name.replace('_', '-')} {getattr(asked, name)}: must be at least {least}")
    for name in ("images", "small_images"):
        if (value := getattr(asked, name)) % asked.batch:
            raise UsageError(
                f"bench data: --{name.replace('_', '-')} {value}: must be a multiple of --batch {asked.batch}"
            )
    if not 0 < asked.min_area <= 1:
        raise UsageError(f"bench data: --min-area {asked.min_area}: must be above 0 and at most 1")
    if asked.sides and (min(asked.sides) < 8 or not asked.images):
        raise UsageError(
            f"bench data: --sides {min(asked.sides)}: must be at least 8, with at least one batch of --images"
        )
    if unknown := set(asked.loaders) - set(LOADERS):
        raise UsageError(f"bench data: unknown --loaders {min(unknown)}; available: {', '.join(LOADERS)}")
    if unknown := set(asked.writers) - set(WRITERS):
        raise UsageError(f"bench data: unknown --writers {min(unknown)}; available: {', '.join(WRITERS)}")
    if asked.out and not Path(asked.out).absolute().parent.is_dir():
        raise UsageError(f"bench data: --out {asked.out}: its folder does not exist; create it first")


def _works(asked: DataArguments) -> Iterator[tuple[str, Work, int]]:
    """Yields each kind of images as (title, work, encoded bytes), in a folder that lasts until the next one."""
    shared = {name: getattr(asked, name) for name in ("batch", "workers", "repeats")}
    jpeg = Work("", asked.images, 512, "jpg", 224, asked.min_area, **shared)
    small = Work("", asked.small_images, 28, "png", 28, 0.0, **shared)
    for title, work in (("JPEG 512 px to 224 px parts", jpeg), ("PNG 28 px", small)):
        if not work.num:
            continue
        with scratch("bench") as folder:
            work = replace(work, folder=str(folder))
            Terminal().say(f"generating {work.num} images: {title}")
            num_bytes = make_images(work)
            save_work(work)
            yield title, work, num_bytes


def _feed_works(asked: DataArguments) -> Iterator[tuple[str, Work, int]]:
    """Yields PNGs and JPEGs of each side as (title, work, encoded bytes), in a folder that lasts until the next one."""
    shared = {name: getattr(asked, name) for name in ("batch", "workers", "repeats", "min_area")}
    for side, ending in itertools.product(asked.sides, ("png", "jpg")):
        with scratch("bench") as folder:
            work = Work(str(folder), asked.images, side, ending, side, **shared)
            title = f"{'PNG' if ending == 'png' else 'JPEG'} {side} px"
            Terminal().say(f"generating {work.num} images: {title}")
            num_bytes = make_images(work)
            save_work(work)
            yield title, work, num_bytes


def _feeding(title: str, work: Work, num_bytes: int) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:  # one at a time, because waiting processes would still use memory
        run = TimedProcess(kind, work.folder, module=FEED)
        try:
            run.wait()
            for _ in range(work.repeats):
                run.epoch()
        finally:
            run.end()
        rows.append(_row(kind, title, run.figures(), "feed", num_bytes / work.num))
    return rows


def _loading(names: Sequence[str], title: str, work: Work, num_bytes: int) -> list[dict[str, Any]]:
    runs = [TimedProcess(name, work.folder) for name in names]
    try:
        for run in runs:
            run.wait()
        # In turns, so that other load on the machine affects all of them equally.
        for _ in range(work.repeats):
            for run in runs:
                run.epoch()
    finally:
        for run in runs:
            run.end()
    return [_row(run.name, title, run.figures(), "loading", num_bytes / work.num) for run in runs]


def _conversion(names: Sequence[str], title: str, work: Work, num_bytes: int) -> list[dict[str, Any]]:
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(work.repeats):
        for name in names:
            if not any("why_not" in figures for figures in rounds[name]):
                rounds[name].append(_written(name, work.folder))
    kind = title.partition(" to ")[0]  # writers do not crop
    return [_row(name, kind, _median(rounds[name]), "conversion", num_bytes / work.num) for name in names]


def _written(name: str, folder: str) -> dict[str, Any]:
    """The figures of a writer in its own process, with its peak memory; or `why_not`."""
    run = TimedProcess(name, folder, module=CONVERSION)
    try:
        run.wait()
        return run.first
    finally:
        run.end()
        run.first["peak_gib"] = run.peak_bytes / 2**30


def _median(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if failed := [figures for figures in rounds if figures["why_not"]]:
        return {"why_not": failed[0]["why_not"]}
    return {
        "images_per_s": statistics.median(each["images_per_s"] for each in rounds),
        "images_per_s_of_rounds": [each["images_per_s"] for each in rounds],
        "processor_s_per_1000": statistics.mean(each["processor_s_per_1000"] for each in rounds),
        "bytes_written": rounds[-1]["bytes_written"],
        "peak_gib": max(each["peak_gib"] for each in rounds),
    }


def _row(name: str, title: str, figures: dict[str, Any], half: str, bytes_per_image: float) -> dict[str, Any]:
    row = {"by": name, "images": title, **figures}
    if "why_not" not in row:
        row["mb_per_s"] = row["images_per_s"] * bytes_per_image / 1e6
    Terminal().say(f"  {half}, {name}: {row.get('why_not') or format(row['images_per_s'], ',.0f') + ' images/s'}")
    return row
