"""What the person at the terminal sees: live bars on a terminal, plain lines elsewhere, tables that fit."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 10.0
# What a terminal obeys instead of showing it: control characters, and the marks that turn the direction of text.
_OBEYED = [*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _OBEYED if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """The text with every character that a terminal would obey written out: names and reasons come from anybody."""
    return text.translate(_SHOWN)


class _VisibleLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def show_log_visibly() -> None:
    """Makes warnings printable that Python itself prints: they name files of image sets too."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_VisibleLines())


class _Console(Console):
    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)


class Terminal:
    """Messages go to standard error, so that standard output holds results only (tables, JSON)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = _Console(stderr=True, highlight=False, quiet=quiet)
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line."""
        # In a log a line stays one line, however long; on a terminal it is folded between words.
        self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

    def step(self, name: str, state: str) -> None:
        """A step starts, resumes or is done."""
        self._end_bars()
        self._console.print(f"[bold]{name:<9}[/bold] {state}")

    def trace(self, text: str) -> None:
        """The traceback of an unexpected error."""
        self._end_bars()
        self.say(text)

    def progress(self, name: str, values: dict[str, Any]) -> None:
        """Shows where `name` (a step or a trial) stands: {"done", "total", "unit"}, or what the loop reports."""
        if "finished_epoch" in values:
            self.say(_epoch_line(name, values))
        elif "done" in values:
            self._bar(name, values["done"], values["total"], f"{values['done']}/{values['total']} {values['unit']}")
        else:
            done = (values["epoch"] - 1) * values["steps"] + values["step"]
            total = values["epochs"] * values["steps"]
            text = f"epoch {values['epoch']}/{values['epochs']}  {values['images_per_s']:.0f} images/s"
            if "loss" in values:
                text += f"  loss {values['loss']:.3f}"
            self._bar(name, done, total, text, values.get("left_s"))

    def close(self) -> None:
        """Ends the live display."""
        self._end_bars()

    def _bar(self, name: str, done: int, total: int, text: str, left_s: float | None = None) -> None:
        if not self._console.is_terminal:
            self._plain_line(name, done, total, text, left_s)
            return
        if self._live is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._live = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._live.start()
        if name not in self._tasks:
            self._tasks[name] = self._live.add_task(name, total=total, text=text)
        self._live.update(self._tasks[name], completed=done, total=total, text=text)

    def _plain_line(self, name: str, done: int, total: int, text: str, left_s: float | None) -> None:
        """For a log file: now and then a line, and always the last."""
        now = time.monotonic()
        began, done_then = self._began.setdefault(name, (now, done))
        if done < total and now - self._said.get(name, now - PLAIN_EVERY_S) < PLAIN_EVERY_S:
            return
        self._said[name] = now
        if left_s is None and done > done_then:
            left_s = (now - began) * (total - done) / (done - done_then)
        left = f", {duration(left_s)} left" if left_s is not None and done < total else ""
        self.say(f"{name}: {text}  ({100 * done // max(total, 1)} %{left})")

    def _end_bars(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live, self._tasks, self._began, self._said = None, {}, {}, {}


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numeric: Sequence[str] = (),
    width: int | None = None,
) -> None:
    """Prints a table on standard output, folded to the width of the terminal, or to `width` where that is less.

    Columns named in `numeric` are set flush right and never folded; nor is a key.
    """
    drawn = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        is_number = column in numeric
        drawn.add_column(
            column, overflow="fold", justify="right" if is_number else "left", no_wrap=is_number or column == "key"
        )
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    out = console()
    out.print(drawn, width=min(width or out.width, out.width))


def console() -> Console:
    """Standard output; 110 columns where it is no terminal, so that a log keeps its tables whole."""
    return _Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 0:07, 12:30, 3:02:10."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _epoch_line(name: str, values: dict[str, Any]) -> str:
    return (
        f"{name}: epoch {values['epoch']:.0f}  loss {values['train_loss']:.4f}  val loss {values['val_loss']:.4f}  "
        f"val AUC {values['val_auc']:.4f}  val accuracy {values['val_accuracy']:.4f}  "
        f"{values['images_per_s']:.0f} images/s"
    )
