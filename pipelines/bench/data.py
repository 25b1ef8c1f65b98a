"""`medmamba bench data`: how fast batches come out of shards, beside what else a user would take; a table and JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tyro

from pipelines.bench.feed import KINDS, feed_table
from pipelines.bench.peers.loaders import LOADERS, Work, make_images, save_work, summarise, told_in
from pipelines.bench.peers.writers import WRITERS
from pipelines.console.arguments import UsageError, parse
from pipelines.console.terminal import Terminal, console, table
from pipelines.scratch import scratch

_LOOK_EVERY_S = 1.0  # reading the memory of many processes takes time from those that are measured
_ENDS_IN_S = 20
# Imported, not run as a module: what Ray's workers get must not be of a module that is called __main__.
_LOAD = "from pipelines.bench.peers.loaders import main; main()"
_WRITE = "from pipelines.bench.peers.writers import main; main()"
_FEED = "from pipelines.bench.feed import main; main()"


def bench_data(argv: Sequence[str]) -> int:
    """Measure conversion and loading on this machine."""

    def arguments(
        images: int = 2048,
        small_images: int = 20480,
        min_area: float = 0.08,
        batch: int = 64,
        workers: int = 2,
        repeats: int = 3,
        loaders: tuple[str, ...] = (),
        writers: tuple[str, ...] = (),
        only: Literal["", "loading", "conversion"] = "",
        sides: tuple[int, ...] = (),
        out: str = "",
        json: tyro.conf.FlagCreatePairsOff[bool] = False,
    ) -> dict[str, Any]:
        """Measure conversion into shards, and batches out of them, beside what else a user would take.

        The images are drawn here. JPEGs of 512 px become random parts of 224 px, PNGs of 28 px stay whole. Each loader
        and writer has a process of its own, with as many workers; one that loses, repeats or alters an image has no
        speed.

        Args:
            images: JPEGs of 512 px; 0 leaves them out. A multiple of the batch.
            small_images: PNGs of 28 px; 0 leaves them out. A multiple of the batch.
            min_area: The least share of a JPEG's area that a random part has.
            batch: Images in a batch.
            workers: Processes of each loader.
            repeats: Timed epochs, of which the median counts; one before them starts the workers and is checked.
            loaders: Which loaders; empty: all.
            writers: Which ways to make shards of the images; empty: all.
            only: Measure one half, loading or conversion.
            sides: Sides in pixels. Given, only this project's loader is measured, as it feeds a GPU: PNGs and JPEGs of
                each side, whole (decoded in each epoch, or kept decoded) and random parts of them.
            out: File for the figures as JSON.
            json: Print JSON instead of tables.
        """
        return dict(locals())

    asked = parse(arguments, "bench data", argv)
    _check(asked)
    if asked["sides"]:
        return _show_feed(asked)
    figures: dict[str, Any] = {"workers": asked["workers"], "loading": [], "conversion": []}
    for title, work, num_bytes in _works(asked):
        if asked["only"] != "conversion":
            figures["loading"] += _loading(asked["loaders"] or tuple(LOADERS), title, work, num_bytes)
        if asked["only"] != "loading":
            figures["conversion"] += _conversion(asked["writers"] or tuple(WRITERS), title, work, num_bytes)
    if asked["out"]:
        Path(asked["out"]).write_text(json.dumps(figures, indent=2) + "\n")
    if asked["json"]:
        print(json.dumps(figures, indent=2))
        return 0
    for half, rows in (("Loading", figures["loading"]), ("Conversion", figures["conversion"])):
        for title in dict.fromkeys(row["images"] for row in rows):
            table(f"{half}: {title}, {asked['workers']} workers", *speed_table(rows, title))
        for row in rows:
            if "why_not" in row:
                console().print(f"{half}, {row['by']}, {row['images']}: not measured: {row['why_not']}")
    return 0


def _show_feed(asked: dict[str, Any]) -> int:
    rows = [row for title, work, num_bytes in _feed_works(asked) for row in _feeding(title, work, num_bytes)]
    figures = {"workers": asked["workers"], "batch": asked["batch"], "feed": rows}
    if asked["out"]:
        Path(asked["out"]).write_text(json.dumps(figures, indent=2) + "\n")
    if asked["json"]:
        print(json.dumps(figures, indent=2))
        return 0
    table(f"Feed: {asked['workers']} workers, batches of {asked['batch']}", *feed_table(rows))
    for row in rows:
        if "why_not" in row:
            console().print(f"{row['images']}, {row['by']}: not measured: {row['why_not']}")
    return 0


def speed_table(rows: Sequence[dict[str, Any]], title: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table of loaders or writers; ratios are to the first."""
    columns = ("by", "images/s", "MB/s", "processor s\nper 1,000", "peak\nGiB", "this project\nis faster by")
    told = [row for row in rows if row["images"] == title and "why_not" not in row]
    return columns, [
        (
            row["by"],
            f"{row['images_per_s']:,.0f}",
            f"{row['mb_per_s']:,.1f}",
            f"{row['processor_s_per_1000']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{told[0]['images_per_s'] / row['images_per_s']:.2f}" if told[0]["by"] == "medmamba" else "",
        )
        for row in told
    ]


def _check(asked: dict[str, Any]) -> None:
    for name, least in (("images", 0), ("small_images", 0), ("batch", 1), ("workers", 1), ("repeats", 1)):
        if asked[name] < least:
            raise UsageError(f"bench data: --{name.replace('_', '-')} {asked[name]}: it must be at least {least}")
    for name in ("images", "small_images"):
        if asked[name] % asked["batch"]:
            raise UsageError(
                f"bench data: --{name.replace('_', '-')} {asked[name]}: make it a multiple of --batch {asked['batch']}"
            )
    if not 0 < asked["min_area"] <= 1:
        raise UsageError(f"bench data: --min-area {asked['min_area']}: a share of the area, above 0 and up to 1")
    if asked["sides"] and (min(asked["sides"]) < 8 or not asked["images"]):
        raise UsageError(f"bench data: --sides {min(asked['sides'])}: at least 8, and --images at least one batch")
    if unknown := set(asked["loaders"]) - set(LOADERS):
        raise UsageError(f"bench data: --loaders {min(unknown)}: there are {', '.join(LOADERS)}")
    if unknown := set(asked["writers"]) - set(WRITERS):
        raise UsageError(f"bench data: --writers {min(unknown)}: there are {', '.join(WRITERS)}")
    if asked["out"] and not Path(asked["out"]).absolute().parent.is_dir():
        raise UsageError(f"bench data: --out {asked['out']}: its folder does not exist; make it first")


def _works(asked: dict[str, Any]) -> Iterator[tuple[str, Work, int]]:
    """Each kind of images, drawn into a folder that lasts until the next is asked for, with their coded bytes."""
    shared = {name: asked[name] for name in ("batch", "workers", "repeats")}
    jpeg = Work("", asked["images"], 512, "jpg", 224, asked["min_area"], **shared)
    small = Work("", asked["small_images"], 28, "png", 28, 0.0, **shared)
    for title, work in (("JPEG 512 px to 224 px parts", jpeg), ("PNG 28 px", small)):
        if not work.num:
            continue
        with scratch("bench") as folder:
            work = replace(work, folder=str(folder))
            Terminal().say(f"drawing {work.num} images: {title}")
            num_bytes = make_images(work)
            save_work(work)
            yield title, work, num_bytes


def _feed_works(asked: dict[str, Any]) -> Iterator[tuple[str, Work, int]]:
    """PNGs and JPEGs of each side, drawn into a folder that lasts until the next are asked for."""
    shared = {name: asked[name] for name in ("batch", "workers", "repeats", "min_area")}
    for side, ending in itertools.product(asked["sides"], ("png", "jpg")):
        with scratch("bench") as folder:
            work = Work(str(folder), asked["images"], side, ending, side, **shared)
            title = f"{'PNG' if ending == 'png' else 'JPEG'} {side} px"
            Terminal().say(f"drawing {work.num} images: {title}")
            num_bytes = make_images(work)
            save_work(work)
            yield title, work, num_bytes


def _feeding(title: str, work: Work, num_bytes: int) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:  # one after the other: processes that wait would still take memory
        run = _Run(kind, work.folder, code=_FEED)
        try:
            run.wait()
            for _ in range(work.repeats):
                run.epoch()
        finally:
            run.end()
        rows.append(_row(kind, title, run.figures(), "feed", num_bytes / work.num))
    return rows


def _loading(names: Sequence[str], title: str, work: Work, num_bytes: int) -> list[dict[str, Any]]:
    runs = [_Run(name, work.folder) for name in names]
    try:
        for run in runs:
            run.wait()
        # In turns, so that what else the machine does meets all of them alike.
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
    kind = title.partition(" to ")[0]  # whole files are written
    return [_row(name, kind, _median(rounds[name]), "conversion", num_bytes / work.num) for name in names]


def _written(name: str, folder: str) -> dict[str, Any]:
    """What a writer told in a process of its own, with the memory it took, or why it told nothing."""
    run = _Run(name, folder, code=_WRITE)
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


class _Run:
    """A loader or writer in a process of its own, and the memory that it and its children took at most."""

    def __init__(self, name: str, folder: str, *, code: str = _LOAD):
        self.name, self.why_not, self.peak_bytes = name, "", 0
        self.first: dict[str, Any] = {}
        self.epochs: list[dict[str, float]] = []
        self._complained = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complained,
            text=True,
        )
        self._watching = True
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def wait(self) -> None:
        """Until its workers have started and its first epoch (or what it wrote) was found right, or not."""
        self.first = self._told()
        self.why_not = self.why_not or self.first["why_not"]

    def epoch(self) -> None:
        """One more epoch is timed, unless it has failed."""
        if not self.why_not:
            assert self._process.stdin is not None
            print("next", file=self._process.stdin, flush=True)
            told = self._told()
            if not self.why_not:
                self.epochs.append(told)

    def end(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._watching = False
        self._watch.join()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_ENDS_IN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._complained.close()

    def figures(self) -> dict[str, Any]:
        """Its row, or why it has none."""
        if self.why_not:
            return {"why_not": self.why_not}
        return {**summarise(self.epochs), "peak_gib": self.peak_bytes / 2**30}

    def _told(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (told := told_in(line)) is not None:
                return told
        self._complained.seek(0)
        said = self._complained.read().strip().splitlines() or ["nothing was said"]
        last = next((line for line in reversed(said) if re.match(r"[\w.]*(Error|Exception)\b", line)), said[-1])
        self.why_not = f"ended with {self._process.wait()}: {last}"
        return {"why_not": self.why_not}

    def _look(self) -> None:
        while self._watching:
            self.peak_bytes = max(self.peak_bytes, _memory_bytes(self._process.pid))
            time.sleep(_LOOK_EVERY_S)


def _memory_bytes(pid: int) -> int:
    """Memory of a process and all that it started; what they share is counted once (PSS)."""
    import psutil

    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total += getattr(memory, "pss", memory.rss)
    return total
