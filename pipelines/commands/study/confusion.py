"""A confusion matrix as a table, or the largest confusions of one that is too wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.console.terminal import console, table
from pipelines.wording import counted

MOST_CLASSES = 12
MOST_CONFUSIONS = 10
_BETWEEN = 3  # columns that the line between two cells takes
_LONGEST_NAME = 24

Counts = Sequence[Sequence[int]]


def print_confusion(confusion: Sequence[Any], classes: Sequence[str], *, is_multilabel: bool, width: int) -> None:
    """Prints counts (classes, classes), rows: labels, columns: predictions; multilabel: (classes, 2, 2)."""
    if is_multilabel:
        _print_labels(confusion, classes, width)
    elif len(classes) <= MOST_CLASSES and _needed(confusion, classes, 0) <= width:
        _print_matrix(confusion, classes, width)
    else:
        _print_largest(confusion, classes, width)


def _needed(confusion: Counts, classes: Sequence[str], name: int) -> int:
    """Columns of the matrix, if names take `name` of them."""
    columns = zip(*confusion, strict=True)
    cells = [max(len(str(at)), *(len(str(each)) for each in col)) for at, col in enumerate(columns, 1)]
    return len(str(len(classes))) + (name + 1 if name else 0) + sum(cell + _BETWEEN for cell in cells)


def _print_matrix(confusion: Counts, classes: Sequence[str], width: int) -> None:
    numbers = [str(number) for number in range(1, len(classes) + 1)]
    longest = max(len(name) for name in classes)
    limit = min(longest, _LONGEST_NAME, width - _needed(confusion, classes, 0) - 1)
    has_names = limit >= min(longest, 8)
    firsts = [f"{n} {_clipped(name, limit)}" if has_names else n for n, name in zip(numbers, classes, strict=True)]
    rows = [(first, *map(str, counts)) for first, counts in zip(firsts, confusion, strict=True)]
    table("Confusion matrix", ("", *numbers), rows, numeric=numbers, width=width)
    console().print("Rows: labels; columns: predictions.")
    if not has_names:
        legend = ", ".join(f"{n} {_clipped(name, _LONGEST_NAME)}" for n, name in zip(numbers, classes, strict=True))
        console().print(legend, width=min(width, console().width))


def _print_largest(confusion: Counts, classes: Sequence[str], width: int) -> None:
    pairs = [
        (count, label, guess)
        for label, counts in enumerate(confusion)
        for guess, count in enumerate(counts)
        if label != guess and count
    ]
    pairs.sort(key=lambda pair: -pair[0])
    rows = [
        (_clipped(classes[label], 28), _clipped(classes[guess], 28), f"{count:,}")
        for count, label, guess in pairs[:MOST_CONFUSIONS]
    ]
    if not rows:
        console().print("No image was confused.")
        return
    table("Largest confusions", ("label", "predicted", "images"), rows, numeric=("images",), width=width)
    if more := len(pairs) - len(rows):
        console().print(f"{counted(more, 'more pair')} of classes confused less often (--json has the matrix)")


def _print_labels(confusion: Sequence[Counts], classes: Sequence[str], width: int) -> None:
    """A row per class; of very many, those with most errors."""
    rows = list(zip(classes, confusion, strict=True))
    if len(rows) > MOST_CLASSES:
        rows = sorted(rows, key=lambda row: -(row[1][0][1] + row[1][1][0]))[:MOST_CONFUSIONS]
    numeric = ("found", "missed", "false alarms", "rightly not")
    shown = [
        (_clipped(name, _LONGEST_NAME), *(f"{each:,}" for each in (yes[1], yes[0], no[1], no[0])))
        for name, (no, yes) in rows
    ]
    table("Labels found and missed", ("class", *numeric), shown, numeric=numeric, width=width)
    if more := len(classes) - len(rows):
        console().print(f"{counted(more, 'more class', 'more classes')} with fewer errors (--json has all)")


def _clipped(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: max(1, limit - 1)]}…"
