"""The study of an evaluation as tables of 80 columns: classes, confusions, intervals, calibration, worst subgroup."""

from __future__ import annotations

from pipelines.commands.study.confusion import print_confusion
from pipelines.console.terminal import console, table
from pipelines.evaluation.parts import Interval, Reliability, Study, SubgroupFigures
from pipelines.wording import counted

WIDTH = 80  # columns, on any terminal and in a log
MOST_CLASSES = 20
_LONGEST_NAME = 15
_BY_CLASS = {"sensitivity": "sens.", "specificity": "spec.", "precision": "prec.", "f1": "F1"}
_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
    "average_precision": "average precision",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "mcc": "Matthews correlation",
    "kappa": "kappa",
    "brier": "Brier score",
}


def print_study(study: Study) -> None:
    """Prints what a study says, and where it says nothing the reason."""
    _print_classes(study)
    print_confusion(study.confusion, study.classes, is_multilabel=study.task == "multilabel", width=WIDTH)
    _print_macro(study)
    out = console()
    width = min(WIDTH, out.width)
    out.print(_calibration(study), width=width)
    if study.subgroups and study.subgroups[0].unranked is None:
        out.print(_worst(study.subgroups[0]), width=width)
    out.print(study.sample_size, width=width)


def _print_classes(study: Study) -> None:
    """Classes in their own order; of very many, those with the smallest AUC."""
    shown = study.by_class
    if len(shown) > MOST_CLASSES:
        defined = [each for each in shown if each.figures["auc"].value is not None]
        shown = sorted(defined, key=lambda each: each.figures["auc"].value or 0.0)[:MOST_CLASSES]
    rows = [
        (
            clipped(each.name, _LONGEST_NAME),
            f"{each.support:,}",
            number(each.figures["auc"].value),
            bounds(each.figures["auc"], "-"),
            *(number(each.figures[name].value) for name in _BY_CLASS),
        )
        for each in shown
    ]
    numeric = ("images", "AUC", "95 % interval", *_BY_CLASS.values())
    table(f"Classes of the {study.split} split", ("class", *numeric), rows, numeric=numeric, width=WIDTH)
    if more := len(study.by_class) - len(shown):
        console().print(
            f"{counted(more, 'more class', 'more classes')}, whose AUC is not smaller or not defined (--json has all)"
        )


def _print_macro(study: Study) -> None:
    # Of exclusive classes the balanced accuracy is the mean sensitivity.
    is_twice = study.task != "multilabel"
    names = [name for name in _NAMES if name in study.macro and not (is_twice and name == "balanced_accuracy")]
    words = {**_NAMES, **({"sensitivity": "sensitivity (balanced accuracy)"} if is_twice else {})}
    rows = [
        (words[name], number(study.macro[name].value), bounds(study.macro[name]), _over(study, name)) for name in names
    ]
    title = f"Means over classes, intervals by group ({counted(study.num_groups, 'group')})"
    width = 4 if any(note for *_, note in rows) else 3
    header = ("figure", "value", "95 % interval", "note")[:width]
    table(title, header, [row[:width] for row in rows], numeric=("value", "95 % interval"), width=WIDTH)


def _over(study: Study, name: str) -> str:
    over = study.averaged.get(name, len(study.classes))
    if study.macro[name].value is None:
        return "not defined"
    return f"over {over} of {len(study.classes)} classes" if over < len(study.classes) else ""


def _calibration(study: Study) -> str:
    found = study.calibration
    line = f"Calibration error (ECE) {_error(found.raw)}"
    if found.calibrated is None or found.temperature is None:
        return f"{line}; not calibrated: {study.absent.get('validation', 'no validation split')}"
    return f"{line} -> {_error(found.calibrated)} calibrated (temperature {found.temperature:.3g})"


def _error(found: Reliability) -> str:
    return f"{number(found.error.value)} ({bounds(found.error)})"


def _worst(found: SubgroupFigures) -> str:
    auc = found.figures["auc"]
    size = f"{counted(found.num_samples, 'image')} of {counted(found.num_groups, 'group')}"
    name = f"{found.column} {clipped(found.value, 40)}"
    return f"Worst subgroup: {name}, AUC {number(auc.value)} ({bounds(auc)}), {size}"


def number(value: float | None) -> str:
    """With three digits after the point; a dash where it is not defined."""
    return "-" if value is None else f"{value:.3f}"


def bounds(interval: Interval, between: str = " to ") -> str:
    """The bounds of an interval; a dash where it has none."""
    if interval.low is None or interval.high is None:
        return "-"
    return f"{interval.low:.3f}{between}{interval.high:.3f}"


def clipped(name: str, limit: int) -> str:
    """The name, shortened at its end."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"
