"""What the person at the terminal sees: live bars on a terminal, plain lines elsewhere, tables that fit."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 10.0


class Terminal:
    """Messages go to standard error, so that standard output holds results only (tables, JSON)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False)

    def step(self, name: str, state: str) -> None:
        """A step starts, resumes or is done."""
        self._end_bars()
        self._console.print(f"[bold]{name:<9}[/bold] {state}")

    def trace(self, text: str) -> None:
        """The traceback of an unexpected error."""
        self._end_bars()
        self._console.print(text, markup=False)

    def progress(self, name: str, values: dict[str, Any]) -> None:
        """Shows where `name` (a step or a trial) stands: {"done", "total", "unit"}, or what the loop reports."""
        if "finished_epoch" in values:
            self._end_bar(name)
            self._console.print(_epoch_line(name, values), markup=False)
        elif "done" in values:
            self._bar(name, values["done"], values["total"], f"{values['done']}/{values['total']} {values['unit']}")
        else:
            done = (values["epoch"] - 1) * values["steps"] + values["step"]
            total = values["epochs"] * values["steps"]
            text = f"epoch {values['epoch']}/{values['epochs']}  {values['images_per_s']:.0f} images/s"
            if "loss" in values:
                text += f"  loss {values['loss']:.3f}"
            self._bar(name, done, total, text)

    def close(self) -> None:
        """Ends the live display."""
        self._end_bars()

    def _bar(self, name: str, done: int, total: int, text: str) -> None:
        if not self._console.is_terminal:
            # A log file: now and then a line, and always the last.
            now = time.monotonic()
            if done >= total or now - self._said.get(name, now - PLAIN_EVERY_S) >= PLAIN_EVERY_S:
                self._said[name] = now
                self._console.print(f"{name}: {text} ({100 * done // max(total, 1)} %)", markup=False)
            return
        if self._live is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._live = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._live.start()
        if name not in self._tasks:
            self._tasks[name] = self._live.add_task(name, total=total, text=text)
        self._live.update(self._tasks[name], completed=done, text=text)

    def _end_bar(self, name: str) -> None:
        # The bar itself goes on: only its line of text would be stale.
        self._said.pop(name, None)

    def _end_bars(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live, self._tasks = None, {}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table on standard output, folded to the width of the terminal."""
    drawn = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    console().print(drawn)


def console() -> Console:
    """Standard output; 100 columns where it is no terminal, so that a log keeps its tables whole."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)


def _epoch_line(name: str, values: dict[str, Any]) -> str:
    return (
        f"{name}: epoch {values['epoch']:.0f}  loss {values['train_loss']:.4f}  val loss {values['val_loss']:.4f}  "
        f"val AUC {values['val_auc']:.4f}  val accuracy {values['val_accuracy']:.4f}  "
        f"{values['images_per_s']:.0f} images/s"
    )
