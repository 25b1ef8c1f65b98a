"""Draws a study: how well the classes are separated, how far the probabilities can be believed, and for whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.parts import Curve, Reliability, Study
from pipelines.report.parts import Figure, Table
from pipelines.report.svg import COLORS, DASHES, GRAY, draw
from pipelines.report.words import bounds, clipped, labels, number, plain

MOST_LINES = len(COLORS)
MOST_SUBGROUPS = 25
_POINTS = 11  # of each curve in the tables


def roc(found: Study, name: str = "roc") -> Figure:
    """Receiver operating characteristic of each class; `name` makes its ids unique on a page."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle=":")
        _lines(axes, found, lambda curve: (curve.false_positive_rate, curve.true_positive_rate), "auc")
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))

    return Figure(
        "ROC by class",
        draw(name, paint),
        f"ROC curve of {_of_classes(found)}. AUC: {_each(found, 'auc')}.",
        f"One class against the rest, on {found.split}. The dotted diagonal is chance.{_not_drawn(found)}",
        _curve_table(found, "1 - specificity and sensitivity", lambda c: (c.false_positive_rate, c.true_positive_rate)),
    )


def precision_recall(found: Study) -> Figure:
    """Precision by recall of each class."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        _lines(axes, found, lambda curve: (curve.true_positive_rate, curve.precision), "average_precision")
        axes.set(xlabel="recall", ylabel="precision", xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))

    return Figure(
        "Precision and recall by class",
        draw("pr", paint),
        f"Precision-recall curve of {_of_classes(found)}. Average precision: {_each(found, 'average_precision')}.",
        f"Chance is a level line at the share of the class.{_not_drawn(found)}",
        _curve_table(found, "recall and precision", lambda c: (c.true_positive_rate, c.precision)),
    )


def confusion(found: Study) -> Figure:
    """The confusion matrix; of a multilabel study the four counts of each class."""
    names = [plain(name) for name in found.classes]
    if found.task == "multilabel":
        header = ["true positive", "false negative", "false positive", "true negative"]
        counts = np.array([[m[1][1], m[1][0], m[0][1], m[0][0]] for m in found.confusion], dtype=float)
        pairs = counts.reshape(-1, 2, 2).sum(2, keepdims=True)
        shares = (counts.reshape(-1, 2, 2) / np.maximum(pairs, 1)).reshape(-1, 4)
        caption = "Counts of each class; shades are shares of the images with the class, and of those without it."
    else:
        header, counts = names, np.array(found.confusion, dtype=float)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        caption = "Rows are the labels, columns the predictions; shades are shares of the row."
    columns = ["TP", "FN", "FP", "TN"] if found.task == "multilabel" else labels(names, 14)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="#cccccc", linewidth=0.5)
        size = 10 if max(shares.shape) <= 8 else 7
        if max(shares.shape) <= 16:
            for (row, column), share in np.ndenumerate(shares):
                color = "white" if share > 0.55 else "#1a1a1a"
                text = f"{counts[row, column]:.0f}"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color, fontsize=size)
        turned = 0 if found.task == "multilabel" else 90 if len(columns) > 6 else 30
        kept = {} if turned == 0 else {"ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=turned, fontsize=size, **kept)
        axes.set_yticks(np.arange(len(names)) + 0.5, labels(names, 14), fontsize=size)
        axes.invert_yaxis()
        axes.set_ylabel("label")
        axes.set_xlabel("" if found.task == "multilabel" else "predicted")

    rows = [(name, *(f"{value:.0f}" for value in row)) for name, row in zip(names, counts, strict=True)]
    stated = "; ".join(f"{name}: {share:.0%}" for name, share in zip(names, _hit(shares, found.task), strict=True))
    return Figure(
        "Confusion matrix",
        draw("confusion", paint),
        f"Confusion matrix of {_of_classes(found)}. Share of each class that is found: {stated}.",
        caption,
        Table("Confusion matrix", ["label", *header], rows),
    )


def reliability(found: Study) -> Figure:
    """Observed share by confidence, raw and calibrated."""
    parts = {"raw": found.calibration.raw}
    if found.calibration.calibrated is not None:
        parts["calibrated"] = found.calibration.calibrated

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle=":")
        for at, (name, part) in enumerate(parts.items()):
            points = [(each.confidence, each.observed) for each in part.curve if each.observed.value is not None]
            x, y = [confidence for confidence, _ in points], [share.value or 0.0 for _, share in points]
            low = [0.0 if share.low is None else (share.value or 0.0) - share.low for _, share in points]
            high = [0.0 if share.high is None else share.high - (share.value or 0.0) for _, share in points]
            error = np.maximum([low, high], 0)
            style = {"color": COLORS[at], "linestyle": DASHES[at], "marker": "os"[at], "markersize": 5, "capsize": 2}
            axes.errorbar(x, y, yerr=error, elinewidth=0.8, label=f"{name}, error {number(part.error.value)}", **style)
        axes.set(xlabel="confidence", ylabel="observed share", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.legend(loc="upper left")

    stated = "; ".join(f"{name} {number(part.error.value)}" for name, part in parts.items())
    return Figure(
        "Reliability",
        draw("reliability", paint),
        f"Observed share by confidence. Expected calibration error: {stated}.",
        "On the dotted diagonal a confidence is the share of answers that are right. Bars are 95 % intervals.",
        Table(
            "Reliability by bin",
            ["scores", "confidence", "observed", "95 % interval", "images"],
            [row for name, part in parts.items() for row in _bins(name, part)],
        ),
    )


def decision(found: Study) -> Figure:
    """Net benefit by threshold of at most MOST_LINES classes."""
    shown = _drawn(found)
    names = labels(found.classes)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=GRAY, linewidth=1, label="treat nobody")
        top = 0.05
        for at, number_ in enumerate(shown):
            each = found.decisions[number_]
            style = {"color": COLORS[at], "linestyle": DASHES[at]}
            axes.plot(each.threshold, each.model, label=names[number_], **style)
            axes.plot(each.threshold, each.treat_all, color=COLORS[at], linewidth=0.7, alpha=0.8)
            top = max(top, *each.model)
        axes.set(xlabel="threshold probability", ylabel="net benefit", xlim=(0, 1), ylim=(-0.15 * top, 1.1 * top))
        axes.legend(loc="upper right")

    rows = [
        (plain(each.name), number(each.threshold[at], 2), *(number(v[at]) for v in (each.model, each.treat_all)))
        for each in found.decisions
        for at in _spread(len(each.threshold))
    ]
    return Figure(
        "Decision curve",
        draw("decision", paint),
        f"Net benefit of {_of_classes(found)} by threshold probability, with that of treating everyone and nobody.",
        "Above the gray line and above its thin line (treat everyone) a model is of use at that threshold."
        f"{_not_drawn(found)}",
        Table("Net benefit", ["class", "threshold", "model", "treat all"], rows),
    )


def risk_coverage(found: Study) -> Figure:
    """Share of wrong answers by share of images that are answered."""
    part = found.abstaining

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(part.coverage, part.risk, color=COLORS[0])
        axes.set(xlabel="share of images answered", ylabel="share of wrong answers", xlim=(0, 1.01))
        axes.set_ylim(bottom=0)

    rows = [(number(part.coverage[at], 2), number(part.risk[at])) for at in _spread(len(part.coverage))]
    return Figure(
        "Risk and coverage",
        draw("risk", paint),
        f"Share of wrong answers when only the most confident images are answered; area {number(part.area)}.",
        "From left to right less confident images are answered too.",
        Table("Risk by coverage", ["answered", "wrong"], rows),
    )


def forest(found: Study) -> Figure | None:
    """AUC of each subgroup; None where no column has two values."""
    shown = [each for each in found.subgroups if each.figures["auc"].value is not None][:MOST_SUBGROUPS]
    if not shown:
        return None
    names = [f"{clipped(each.column, 14)} = {clipped(each.value, 14)} ({each.num_samples})" for each in shown]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for at, each in enumerate(shown):
            auc = each.figures["auc"]
            ranked = each.unranked is None
            color = COLORS[0] if ranked else GRAY
            if auc.low is not None:
                axes.plot([auc.low, auc.high], [at, at], color=color, linewidth=1.4)
            axes.plot([auc.value], [at], "s", color=color, markersize=5, fillstyle="full" if ranked else "none")
        overall = found.macro["auc"].value
        if overall is not None:
            axes.axvline(overall, color=COLORS[1], linewidth=1, linestyle="--")
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("AUC (dashed: all images)")

    rows = [
        (name, number(each.figures["auc"].value), bounds(each.figures["auc"]), plain(each.unranked or "ranked"))
        for name, each in zip(names, shown, strict=True)
    ]
    return Figure(
        "Subgroups",
        draw("forest", paint, height=max(2.0, 0.9 + 0.24 * len(names))),
        f"AUC of {len(shown)} subgroups; the first is {names[0]} with {number(shown[0].figures['auc'].value)}.",
        "Worst first; the number of images in parentheses. Open gray squares have too few images to be ranked.",
        Table("AUC by subgroup", ["subgroup (images)", "AUC", "95 % interval", "rank"], rows),
    )


def _lines(axes: Any, found: Study, points: Callable[[Curve], tuple[list[float], list[float]]], figure: str) -> None:
    names, shown = labels(found.classes), _drawn(found)
    for at in range(len(found.classes)):
        if at not in shown:
            axes.plot(*points(found.curves[at]), color="#bbbbbb", linewidth=0.7)
    for at, number_ in enumerate(shown):
        value = number(found.by_class[number_].figures[figure].value)
        style = {"color": COLORS[at], "linestyle": DASHES[at], "label": f"{names[number_]} {value}"}
        axes.plot(*points(found.curves[number_]), **style)
    axes.legend(loc="best")


def _drawn(found: Study) -> list[int]:
    """The classes that have a color: all, or those with the smallest AUC."""
    if len(found.classes) <= MOST_LINES:
        return list(range(len(found.classes)))
    aucs = [each.figures["auc"].value for each in found.by_class]
    order = sorted(range(len(aucs)), key=lambda at: 2.0 if aucs[at] is None else aucs[at])  # type: ignore[return-value, arg-type]
    return sorted(order[:MOST_LINES])


def _not_drawn(found: Study) -> str:
    rest = len(found.classes) - MOST_LINES
    return f" The {MOST_LINES} classes with the smallest AUC are in color; {rest} are not." if rest > 0 else ""


def _of_classes(found: Study) -> str:
    return f"{len(found.classes)} classes" if len(found.classes) != 1 else "one class"


def _each(found: Study, figure: str) -> str:
    return "; ".join(f"{plain(each.name)} {number(each.figures[figure].value)}" for each in found.by_class)


def _curve_table(found: Study, what: str, points: Callable[[Curve], tuple[list[float], list[float]]]) -> Table:
    rows = []
    for curve in found.curves:
        x, y = points(curve)
        rows += [(plain(curve.name), number(x[at]), number(y[at])) for at in _spread(len(x))]
    return Table(f"Points of the curves: {what}", ["class", *what.split(" and ")], rows)


def _spread(num: int) -> list[int]:
    return sorted(set(np.linspace(0, num - 1, min(num, _POINTS)).round().astype(int).tolist()))


def _hit(shares: Any, task: str) -> Sequence[float]:
    return [row[0] for row in shares] if task == "multilabel" else list(np.diag(shares))


def _bins(name: str, part: Reliability) -> list[tuple[str, ...]]:
    return [
        (name, number(e.confidence), number(e.observed.value), bounds(e.observed), f"{e.count:,}") for e in part.curve
    ]
