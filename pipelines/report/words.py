"""Names and numbers as the documents show them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from pipelines.evaluation.parts import Interval

NOT_STATED = "not stated"
FIGURE_NAMES = {
    "auc": "AUC",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
    "f1": "F1",
    "average_precision": "Average precision",
    "mcc": "MCC",
    "kappa": "Kappa",
    "brier": "Brier score",
}
KEY_FIGURES = ("auc", "balanced_accuracy", "sensitivity", "specificity", "average_precision", "brier")


def figure_name(key: str) -> str:
    """The name of a figure."""
    return FIGURE_NAMES.get(key, key.replace("_", " "))


def number(value: float | None, decimals: int = 3) -> str:
    """With so many decimals, one more where it would be shown as 1 and is not. An en dash for None."""
    if value is None:
        return "–"
    for places in (decimals, decimals + 1):
        text = f"{value:.{places}f}"
        if value >= 1 or text != f"{1:.{places}f}":
            return text
    return f">{1 - 10.0 ** -(decimals + 1):.{decimals + 1}f}"


def bounds(interval: Interval) -> str:
    """The bounds, "0.88 to 0.94"; empty where there are none."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{number(interval.low)} to {number(interval.high)}"


def with_bounds(interval: Interval | None) -> str:
    """The value, with its bounds in parentheses where there are any."""
    if interval is None:
        return "–"
    stated = bounds(interval)
    return f"{number(interval.value)} ({stated})" if stated else number(interval.value)


def plain(text: object) -> str:
    """One line without control characters, directions of writing among them: names come from folders and tables."""
    return " ".join("".join(" " if unicodedata.category(c)[0] == "C" else c for c in str(text)).split())


def clipped(text: object, limit: int = 22) -> str:
    """`plain`, at most so long."""
    line = plain(text)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def labels(names: Sequence[str], limit: int = 22) -> list[str]:
    """Short names that stay different from each other."""
    short = [clipped(name, limit) for name in names]
    return [f"{name} [{at}]" if short.count(name) > 1 else name for at, name in enumerate(short, 1)]


def value_text(value: object) -> str:
    """A value of a configuration."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "none"
    return plain(value) if value not in ("", None) else "none"
