"""`medmamba bench data`: how fast batches come out of shards, beside what else a user would take; a table and JSON."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from pipelines.arguments import UsageError, parse
from pipelines.bench_loaders import LOADERS, Work, make_images, save_work, summarise, told_in
from pipelines.terminal import Terminal, console, table

_LOOK_EVERY_S = 1.0  # reading the memory of many processes takes time from those that are measured
_ENDS_IN_S = 20
# Imported, not run as a module: what Ray's workers get must not be of a module that is called __main__.
_RUN = "from pipelines.bench_loaders import main; main()"


def bench_data(argv: Sequence[str]) -> int:
    """Measure loading on this machine."""

    def arguments(
        images: int = 2048,
        small_images: int = 20480,
        min_area: float = 0.08,
        batch: int = 64,
        workers: int = 2,
        repeats: int = 3,
        loaders: tuple[str, ...] = (),
        out: str = "",
        json: tyro.conf.FlagCreatePairsOff[bool] = False,
    ) -> dict[str, Any]:
        """Measure how fast batches come out of shards, beside what else a user would take, on images drawn here.

        JPEGs of 512 px become random parts of 224 px, PNGs of 28 px stay whole. Each loader has a process of its own
        and as many workers, and their epochs take turns. One that loses, repeats or alters an image has no speed.

        Args:
            images: JPEGs of 512 px; 0 leaves them out. A multiple of the batch.
            small_images: PNGs of 28 px; 0 leaves them out. A multiple of the batch.
            min_area: The least share of a JPEG's area that a random part has.
            batch: Images in a batch.
            workers: Processes of each loader.
            repeats: Timed epochs, of which the median counts; one before them starts the workers and is checked.
            loaders: Which; empty: all.
            out: File for the figures as JSON.
            json: Print JSON instead of tables.
        """
        return dict(locals())

    asked = parse(arguments, "bench data", argv)
    _check(asked)
    figures = {"workers": asked["workers"], "loading": _loading(asked)}
    if asked["out"]:
        Path(asked["out"]).write_text(json.dumps(figures, indent=2) + "\n")
    if asked["json"]:
        print(json.dumps(figures, indent=2))
        return 0
    for title in dict.fromkeys(row["images"] for row in figures["loading"]):
        table(f"Loading: {title}, {asked['workers']} workers", *loading_table(figures["loading"], title))
    for row in figures["loading"]:
        if "why_not" in row:
            console().print(f"{row['loader']}, {row['images']}: not measured: {row['why_not']}")
    return 0


def loading_table(rows: Sequence[dict[str, Any]], title: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table of loaders; ratios are to the first."""
    columns = ("loader", "images/s", "MB/s", "processor s\nper 1,000", "peak\nGiB", "this project\nis faster by")
    told = [row for row in rows if row["images"] == title and "why_not" not in row]
    return columns, [
        (
            row["loader"],
            f"{row['images_per_s']:,.0f}",
            f"{row['mb_per_s']:,.1f}",
            f"{row['processor_s_per_1000']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{told[0]['images_per_s'] / row['images_per_s']:.2f}" if told[0]["loader"] == "medmamba" else "",
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
    if unknown := set(asked["loaders"]) - set(LOADERS):
        raise UsageError(f"bench data: --loaders {min(unknown)}: there are {', '.join(LOADERS)}")
    if asked["out"] and not Path(asked["out"]).absolute().parent.is_dir():
        raise UsageError(f"bench data: --out {asked['out']}: its folder does not exist; make it first")


def _loading(asked: dict[str, Any]) -> list[dict[str, Any]]:
    shared = {name: asked[name] for name in ("batch", "workers", "repeats")}
    jpeg = Work("", asked["images"], 512, "jpg", 224, asked["min_area"], **shared)
    small = Work("", asked["small_images"], 28, "png", 28, 0.0, **shared)
    told, found = Terminal(), []
    for title, work in (("JPEG 512 px to 224 px parts", jpeg), ("PNG 28 px", small)):
        if not work.num:
            continue
        with tempfile.TemporaryDirectory(prefix="medmamba-bench-") as folder:
            work = replace(work, folder=folder)
            told.say(f"drawing {work.num} images: {title}")
            num_bytes = make_images(work)
            save_work(work)
            runs = [_Run(name, folder) for name in asked["loaders"] or LOADERS]
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
            for run in runs:
                row = {"loader": run.name, "images": title, **run.figures()}
                if "why_not" not in row:
                    row["mb_per_s"] = row["images_per_s"] * num_bytes / work.num / 1e6
                found.append(row)
                told.say(f"  {run.name}: {row.get('why_not') or format(row['images_per_s'], ',.0f') + ' images/s'}")
    return found


class _Run:
    """A loader in a process of its own, and the memory that it and its children took at most."""

    def __init__(self, name: str, folder: str):
        self.name, self.why_not, self.peak_bytes = name, "", 0
        self.epochs: list[dict[str, float]] = []
        self._complained = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN, name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complained,
            text=True,
        )
        self._watching = True
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def wait(self) -> None:
        """Until its workers have started and its first epoch was found right, or not."""
        told = self._told()
        self.why_not = self.why_not or told["why_not"]

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
