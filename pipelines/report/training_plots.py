"""Draws how a network was trained: its epochs, and the trials of the sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.parts import Figure, Table
from pipelines.report.svg import COLORS, DASHES, GRAY, draw
from pipelines.report.words import number, value_text

_MOST_ROWS = 60
_SERIES = (("train_loss", "val_loss"), ("val_auc", "val_balanced_accuracy"))


def epochs(history: Sequence[Mapping[str, Any]], best: int) -> Figure | None:
    """Loss and validation figures by epoch; None where no epoch is recorded."""
    rows = [row for row in history if isinstance(row.get("epoch"), int | float)]
    if not rows:
        return None
    shown = [[name for name in names if any(_value(row, name) is not None for row in rows)] for names in _SERIES]

    def paint(figure: Any) -> None:
        both = figure.subplots(2, 1, sharex=True)
        for axes, names, what in zip(both, shown, ("loss", "validation"), strict=True):
            axes.axvline(best, color=GRAY, linewidth=1, linestyle=":")
            for at, name in enumerate(names):
                points = [(row["epoch"], value) for row in rows if (value := _value(row, name)) is not None]
                style = {"color": COLORS[at], "linestyle": DASHES[at], "marker": "o" if len(points) < 30 else ""}
                axes.plot(*zip(*points, strict=True), label=_word(name), markersize=3, **style)
            axes.set_ylabel(what)
            if names:
                axes.legend(loc="best")
        both[1].set_xlabel("epoch")
        both[1].xaxis.get_major_locator().set_params(integer=True)

    names = [name for group in shown for name in group]
    step = max(1, -(-len(rows) // _MOST_ROWS))
    table = [(f"{row['epoch']:g}", *(number(_value(row, name)) for name in names)) for row in rows[::step]]
    last = ", ".join(f"{_word(name)} {number(_value(rows[-1], name))}" for name in names)
    return Figure(
        "Training",
        draw("epochs", paint, height=4.2),
        f"Loss and validation figures of {len(rows)} epochs; at the last one {last}.",
        f"The dotted line is epoch {best}, whose weights are kept.",
        Table("Epochs", ["epoch", *map(_word, names)], table),
    )


def trials(rows: Sequence[Mapping[str, Any]], winner: int) -> Figure | None:
    """Best validation AUC of each trial; None where no trial has one."""
    found = [(_number(row, at), _value(row.get("metrics", {}), "best_auc"), row) for at, row in enumerate(rows, 1)]
    if all(value is None for _, value, _ in found):
        return None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for stopped, marker, name in ((False, "o", "ran to the end"), (True, "x", "stopped early")):
            points = [(n, v) for n, v, row in found if v is not None and bool(row.get("stopped_early")) is stopped]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=COLORS[stopped], label=name)
        if winner:
            axes.axvline(winner, color=GRAY, linewidth=1, linestyle=":", label="winner")
        axes.set(xlabel="trial", ylabel="best validation AUC")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="best")

    keys = sorted({key for row in rows for key in row.get("overrides", {})})
    table = [
        (f"{n}", number(v), f"{row.get('epochs', '–')}", *(value_text(row.get("overrides", {}).get(k)) for k in keys))
        for n, v, row in found[:_MOST_ROWS]
    ]
    return Figure(
        "Trials of the sweep",
        draw("trials", paint),
        f"Best validation AUC of {len(rows)} trials; the winner is trial {winner}.",
        "Each trial trains with other hyperparameters; the winner's are used.",
        Table("Trials", ["trial", "val AUC", "epochs", *keys], table),
    )


def _number(row: Mapping[str, Any], otherwise: int) -> int:
    return int(row.get("number") or otherwise)


def _value(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _word(name: str) -> str:
    return name.replace("val_", "validation ").replace("_", " ").replace("auc", "AUC")
