"""Compares two or more runs on one page: their figures side by side, and paired differences on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medmamba.metrics.estimates import Difference, Differences, compare
from pipelines.evaluation.predictions import StoredPredictions
from pipelines.evaluation.study import checked
from pipelines.report import described
from pipelines.report.page import render
from pipelines.report.parts import Figure, Section, Table
from pipelines.report.plots import roc
from pipelines.report.records import RunRecords, predictions_of
from pipelines.report.svg import COLORS, GRAY, draw
from pipelines.report.words import FIGURE_NAMES, clipped, figure_name, labels, number, plain, with_bounds

MOST_CURVES = 6
"""Runs whose ROC curves are shown."""
DIFFERENCES = ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "brier")


def make_comparison(runs: Sequence[RunRecords]) -> bytes:
    """The page that compares runs with the first of them."""
    names = [plain(run.run) for run in runs]
    return render(
        "page.html",
        title=f"Comparison: {', '.join(names)}",
        lead=_lead(runs),
        sections=[_figures(runs), _differences(runs), _classes(runs), _settings(runs), _data(runs)],
        made_from=f"the runs {', '.join(names)}",
    )


def is_same_data(first: RunRecords, second: RunRecords) -> bool:
    """Whether two runs were evaluated on the same images with the same classes."""
    one, two = first.study, second.study
    return (one.manifest, one.split, one.task, one.classes) == (two.manifest, two.split, two.task, two.classes)


def paired(first: RunRecords, second: RunRecords) -> Differences:
    """Every figure of the second run less that of the first. Raises ValueError where they are of other samples."""
    one, two = (predictions_of(run.store, run.run, run.records, run.manifest) for run in (first, second))
    return compare(checked(_by_key(two)), checked(_by_key(one)))


def _by_key(stored: StoredPredictions) -> StoredPredictions:
    order = np.argsort(stored.key, kind="stable")
    return replace(
        stored,
        key=stored.key[order],
        group=stored.group[order],
        labels=stored.labels[order],
        scores=stored.scores[order],
        logits=None,
        metadata={},
    )


def _lead(runs: Sequence[RunRecords]) -> str:
    best = max(runs, key=lambda run: -1.0 if run.study.macro["auc"].value is None else run.study.macro["auc"].value)
    text = f"The largest macro AUC has {plain(best.run)}: {with_bounds(best.study.macro['auc'])}."
    other = [plain(run.run) for run in runs[1:] if not is_same_data(runs[0], run)]
    if other:
        text += f" {', '.join(other)}: evaluated on other data than {plain(runs[0].run)}, so figures do not compare."
    return text


def _figures(runs: Sequence[RunRecords]) -> Section:
    rows = [
        (figure_name(name), *(with_bounds(run.study.macro.get(name)) for run in runs))
        for name in FIGURE_NAMES
        if any(name in run.study.macro for run in runs)
    ]
    header = ["figure", *(plain(run.run) for run in runs)]
    table = Table("Figures of all classes, with 95 % intervals", header, rows)
    return Section("figures", "Figures", tables=[table], figures=[_aucs(runs)])


def _aucs(runs: Sequence[RunRecords]) -> Figure:
    names = labels([run.run for run in runs])
    found = [run.study.macro["auc"] for run in runs]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for at, each in enumerate(found):
            color = COLORS[0] if is_same_data(runs[0], runs[at]) else GRAY
            if each.low is not None:
                axes.plot([each.low, each.high], [at, at], color=color)
            if each.value is not None:
                axes.plot([each.value], [at], "s", color=color, markersize=6)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("macro AUC")

    rows = [
        (name, number(each.value), number(each.low), number(each.high)) for name, each in zip(names, found, strict=True)
    ]
    stated = "; ".join(f"{name} {with_bounds(each)}" for name, each in zip(names, found, strict=True))
    return Figure(
        "AUC by run",
        draw("runs", paint, height=max(1.8, 0.9 + 0.35 * len(names))),
        f"Macro AUC with interval: {stated}.",
        "Lines are 95 % intervals; gray: evaluated on other data than the first run.",
        Table("AUC by run", ["run", "AUC", "low", "high"], rows),
    )


def _differences(runs: Sequence[RunRecords]) -> Section:
    first, tables, text = runs[0], [], []
    for run in runs[1:]:
        name = f"{plain(run.run)} less {plain(first.run)}"
        if not is_same_data(first, run):
            text.append(f"{name}: no paired differences, the runs were evaluated on other data.")
            continue
        try:
            found = paired(first, run)
        except ValueError as error:
            text.append(f"{name}: no paired differences, {plain(error)[:200]}.")
            continue
        rows = [(figure_name(key), *_difference(found.macro[key])) for key in DIFFERENCES if key in found.macro]
        rows += [
            (f"AUC, {clipped(each, 40)}", *_difference(found.classes[at]["auc"]))
            for at, each in enumerate(first.study.classes)
        ]
        caption = f"{name}, on {found.num_samples:,} images of {found.num_groups:,} groups"
        tables.append(Table(caption, ["figure", "difference", "95 % interval", "distinguishable"], rows))
    if tables:
        text.append("Paired by image and clustered by group; distinguishable: the interval does not include 0.")
    return Section("differences", "Paired differences", text, tables=tables)


def _difference(found: Difference) -> tuple[str, str, str]:
    if found.value is None or found.low is None or found.high is None:
        return number(found.value), "–", "–"
    apart = found.low > 0 or found.high < 0
    return f"{found.value:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}", "yes" if apart else "no"


def _classes(runs: Sequence[RunRecords]) -> Section:
    names = list(dict.fromkeys(name for run in runs for name in run.study.classes))
    tables = []
    for key in ("auc", "sensitivity", "specificity"):
        rows = []
        for name in names:
            each = [next((c for c in run.study.by_class if c.name == name), None) for run in runs]
            rows.append((plain(name), *(with_bounds(c.figures[key]) if c else "–" for c in each)))
        tables.append(Table(f"{figure_name(key)} by class", ["class", *(plain(run.run) for run in runs)], rows))
    drawn = [
        replace(figure, title=f"{figure.title}: {plain(run.run)}", table=_of_run(figure.table, run))
        for at, run in enumerate(runs[:MOST_CURVES])
        for figure in [roc(run.study, f"roc-{at}")]
    ]
    return Section("classes", "Classes", tables=tables, figures=drawn)


def _of_run(table: Table, run: RunRecords) -> Table:
    return replace(table, caption=f"{table.caption}, {plain(run.run)}")


def _settings(runs: Sequence[RunRecords]) -> Section:
    found = [dict(described.hyperparameters(run)) | dict(described.training(run)) for run in runs]
    keys = list(dict.fromkeys(key for each in found for key in each))
    rows = [
        (key, *(each.get(key, "–") for each in found)) for key in keys if len({each.get(key) for each in found}) > 1
    ]
    table = Table("Settings that differ", ["key", *(plain(run.run) for run in runs)], rows, "keys")
    return Section("training", "Training", [] if rows else ["All settings are equal."], tables=[table] if rows else [])


def _data(runs: Sequence[RunRecords]) -> Section:
    found = [dict(described.data(run)) for run in runs]
    rows = [(key, *(each.get(key, "–") for each in found)) for key in ("Dataset", "Splits", "Licence", "Manifest")]
    rows.append(("Test images", *(f"{run.study.num_samples:,}" for run in runs)))
    return Section(
        "data", "Data", tables=[Table("Datasets of the runs", ["", *(plain(run.run) for run in runs)], rows, "words")]
    )
