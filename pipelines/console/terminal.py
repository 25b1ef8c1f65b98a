"""What the user sees: progress bars on a terminal, plain lines elsewhere, and tables that fit."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from data_shards.store.outage import Notice
from pipelines.console.work_log import WorkLog
from pipelines.wording import duration

PLAIN_EVERY_S = 10.0
SHOWN_WAIT = 0.05
# Characters that a terminal interprets: control characters and marks that change the direction of text.
_OBEYED = [*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _OBEYED if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """Escapes every character that a terminal would interpret: names and messages may come from untrusted files."""
    return text.translate(_SHOWN)


class _VisibleLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def show_log_visibly() -> None:
    """Escapes such characters in warnings that Python prints itself: they can contain file names too."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_VisibleLines())


class _Console(Console):
    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)


class Terminal:
    """Messages go to standard error, so that standard output holds results only (tables, JSON).

    With `log` they go to the original standard error, and tracebacks into the log's file.
    """

    def __init__(self, *, quiet: bool = False, log: WorkLog | None = None) -> None:
        file = log.terminal if log else None
        self._console = _Console(file=file, stderr=file is None, highlight=False, quiet=quiet)
        self._log = log
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}
        self._waiting: tuple[str, float] | None = None
        self._away: set[str] = set()
        self._back: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Prints one line."""
        # A log keeps each message on one line; on a terminal it wraps between words.
        self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

    def step(self, name: str, state: str) -> None:
        """Reports that a step starts, resumes, is done or failed."""
        self._waiting = None
        self._end_bars()
        self._console.print(f"[bold]{name:<9}[/bold] {state}")

    def trace(self, text: str) -> None:
        """Writes the traceback of an unexpected error, to the log if there is one."""
        self._end_bars()
        if self._log is not None and self._log.path is not None:
            self._log.write(text)
        else:
            self.say(text)

    def details(self) -> str:
        """The end of a message for which the log has details; empty without a log."""
        return self._log.named() if self._log is not None else ""

    def begin(self, what: str) -> None:
        """Reports the start of work that has no progress ("starting Ray"); a terminal shows the elapsed time."""
        self._end_bars()
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), _SecondsColumn())
            self._live = Progress(*columns, console=self._console, transient=True)
            self._live.start()
            self._live.add_task(what, total=None)
        else:
            self.say(what)
        self._waiting = (what, time.monotonic())

    def ready(self) -> None:
        """Reports how long the work of the last `begin` took; does nothing if there is none."""
        if self._waiting is not None:
            (what, began), self._waiting = self._waiting, None
            self._end_bars()
            self.say(f"{what}: took {duration(time.monotonic() - began)}")

    def progress(self, name: str, values: dict[str, Any]) -> None:
        """Shows the progress of `name` (a step or a trial): {"done", "total", "unit"}, or what the loop reports."""
        if "outage" in values:
            self.outage(Notice(**values["outage"]))
            return
        self.ready()
        if "begin" in values:
            self.begin(values["begin"])
        elif "finished_epoch" in values:
            self.say(_epoch_line(name, values))
            if {"gpu_memory_gib", "step_ms"} <= values.keys():  # missing if an earlier process made all steps
                self.say(_gpu_line(name, values))
        elif "warning" in values:
            self.say(f"{name}: {values['warning']}")
        elif "done" in values:
            self._bar(name, values["done"], values["total"], f"{values['done']}/{values['total']} {values['unit']}")
        else:
            done = (values["epoch"] - 1) * values["steps"] + values["step"]
            total = values["epochs"] * values["steps"]
            text = f"epoch {values['epoch']}/{values['epochs']}  {_speed(values)}"
            if "loss" in values:
                text += f"  loss {values['loss']:.3f}"
            self._bar(name, done, total, text, values.get("left_s"))

    def outage(self, notice: Notice) -> None:
        """Reports that a service is down or back: once, however many processes notice it."""
        is_over, who = notice.over_after_s > 0, notice.who
        if is_over and (who in self._away or notice.sent):
            self._away.discard(who)
            self._back[who] = notice.since + notice.over_after_s
        elif not is_over and who not in self._away and notice.since > self._back.get(who, 0.0):
            self._away.add(who)
        else:
            return
        self.say(str(notice))

    def close(self) -> None:
        """Ends the live display."""
        self._waiting = None
        self._end_bars()

    def _bar(self, name: str, done: int, total: int, text: str, left_s: float | None = None) -> None:
        now = time.monotonic()
        began, done_then = self._began.setdefault(name, (now, done))
        if left_s is None and done > done_then:
            left_s = (now - began) * (total - done) / (done - done_then)
        left = f"{duration(left_s)} left" if left_s is not None and done < total else ""
        if not self._console.is_terminal:
            self._plain_line(name, done, total, text, left)
            return
        if self._live is None:
            # The bar gets the space that the text leaves, so that no line wraps at 80 columns.
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4))
            columns = (_words("{task.description}"), bar, _words("{task.fields[text]}"), _words("{task.fields[left]}"))
            self._live = Progress(*columns, console=self._console, transient=True, expand=True)
            self._live.start()
        if name not in self._tasks:
            self._tasks[name] = self._live.add_task(name, total=total, text=text, left=left)
        self._live.update(self._tasks[name], completed=done, text=text, left=left)

    def _plain_line(self, name: str, done: int, total: int, text: str, left: str) -> None:
        """For a log file: a line every PLAIN_EVERY_S seconds, and always the last one."""
        now = time.monotonic()
        if done < total and now - self._said.get(name, now - PLAIN_EVERY_S) < PLAIN_EVERY_S:
            return
        self._said[name] = now
        self.say(f"{name}: {text}  ({100 * done // max(total, 1)} %{f', {left}' if left else ''})")

    def _end_bars(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live, self._tasks, self._began, self._said = None, {}, {}, {}


class _SecondsColumn(TextColumn):
    """The elapsed time, as a clock."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Any) -> Any:
        """See TextColumn."""
        return Text(duration(task.elapsed or 0))


def _words(template: str) -> TextColumn:
    return TextColumn(template, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numeric: Sequence[str] = (),
    width: int | None = None,
) -> None:
    """Prints a table on standard output, wrapped to the width of the terminal, or to `width` if that is less.

    Columns named in `numeric` are right-aligned and never wrapped; nor are the columns `key` and `name`.
    """
    drawn = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in numeric else "left"
        drawn.add_column(column, overflow="fold", justify=justify, no_wrap=column in ("key", "name", *numeric))
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    out = console()
    out.print(drawn, width=min(width or out.width, out.width))


def console() -> Console:
    """A console on standard output; without a terminal $COLUMNS or 110 wide, so that logs keep complete tables."""
    is_known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return _Console(highlight=False, markup=False, width=None if is_known else 110)


def _speed(values: dict[str, Any]) -> str:
    """Images per second of the last steps; with the share of time spent waiting for data if it is large."""
    speed, wait = f"{values['images_per_s']:.0f}", values.get("wait_share", 0.0)
    # Shorter, so that the line still fits 80 columns.
    return f"{speed} img/s  wait {100 * wait:.0f}%" if wait >= SHOWN_WAIT else f"{speed} images/s"


def _epoch_line(name: str, values: dict[str, Any]) -> str:
    """At most 80 columns, also for trials with two-digit numbers."""
    return (
        f"{name}: epoch {values['epoch']:.0f}  loss {values['train_loss']:.3f}  val loss {values['val_loss']:.3f}, "
        f"AUC {values['val_auc']:.4f}, accuracy {values['val_accuracy']:.3f}"
    )


def _gpu_line(name: str, values: dict[str, Any]) -> str:
    """Where the time of an epoch on a GPU went, in at most 80 columns. The checkpoint time is the previous one's."""
    parts = [
        f"{values['images_per_s']:.0f} img/s",
        f"{_brief(values['step_ms'])} ms",
        f"wait {100 * values['data_wait_share']:.0f}%",
        "GPU"
        + (f" {100 * values['gpu_utilization']:.0f}%" if "gpu_utilization" in values else "")
        + f" {_brief(values['gpu_memory_gib'])} GiB",
        *([f"MFU {100 * values['mfu']:.0f}%"] if "mfu" in values else []),
        *([f"save {_brief(values['checkpoint_s'])}s"] if "checkpoint_s" in values else []),
    ]
    return f"{name}: {'  '.join(parts)}"


def _brief(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
