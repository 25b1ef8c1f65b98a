"""The tables of a page, from a study."""

from __future__ import annotations

from pipelines.evaluation.parts import Study
from pipelines.report.parts import Table
from pipelines.report.records import RunRecords
from pipelines.report.words import FIGURE_NAMES, KEY_FIGURES, clipped, figure_name, number, plain, with_bounds

MOST_SUBGROUPS = 40


def key_figures(found: Study) -> Table:
    """The macro figures with their intervals."""
    rows = [
        (figure_name(name), number(each.value), number(each.low), number(each.high))
        for name in FIGURE_NAMES
        if (each := found.macro.get(name)) is not None
    ]
    return Table("Figures of all classes, with 95 % intervals", ["figure", "value", "low", "high"], rows)


def by_class(found: Study) -> Table:
    """The figures of each class."""
    rows = [
        (plain(each.name), f"{each.support:,}", *(with_bounds(each.figures.get(name)) for name in KEY_FIGURES))
        for each in found.by_class
    ]
    return Table("Figures by class, one against the rest", ["class", "images", *map(figure_name, KEY_FIGURES)], rows)


def counts(run: RunRecords) -> Table:
    """Images of each class in each split."""
    found = run.facts("shard").get("counts", {})
    names = [name for name in ("train", "val", "test") if name in found]
    classes = list(dict.fromkeys([*run.study.classes, *(name for split in names for name in found[split])]))
    rows = [(plain(name), *(f"{found[split].get(name, 0):,}" for split in names)) for name in classes]
    samples = run.facts("shard").get("samples", {})
    rows += [("all images", *(f"{samples[split]:,}" for split in names))] if set(names) <= set(samples) else []
    return Table("Images by class and split", ["class", *names], rows)


def baselines(run: RunRecords) -> Table | None:
    """The network next to simpler means, by the figures that all of them have."""
    found = run.facts("evaluate").get("baselines", {})
    names = [name for name in ("auc", "accuracy", "balanced_accuracy", "f1") if name in run.study.macro]
    if not found:
        return None
    rows = [("network", *(number(run.study.macro[name].value) for name in names))]
    rows += [(plain(key), *(number(each.get(name)) for name in names)) for key, each in found.items()]
    return Table("Compared with baselines on the same images", ["", *map(figure_name, names)], rows)


def operating_points(found: Study) -> Table | None:
    """Thresholds that were chosen on validation, with their figures on test."""
    shares = ("sensitivity", "specificity", "precision", "negative_value", "flagged")
    rows = [
        (
            clipped(each.name, 50),
            each.rule,
            number(each.threshold),
            *(with_bounds(getattr(each, name)) for name in shares),
        )
        for each in found.operating_points
    ]
    header = ["class", "chosen for", "threshold", "sensitivity", "specificity", "precision", "NPV", "flagged"]
    return Table("Operating points", header, rows) if rows else None


def subgroups(found: Study) -> Table | None:
    """The figures of each subgroup, worst first."""
    names = ("auc", "sensitivity", "specificity")
    rows = [
        (
            f"{plain(each.column)} = {plain(each.value)}",
            f"{each.num_samples:,}",
            f"{each.num_groups:,}",
            *(with_bounds(each.figures.get(name)) for name in names),
            plain(each.unranked or ""),
        )
        for each in found.subgroups[:MOST_SUBGROUPS]
    ]
    header = ["subgroup", "images", "groups", *map(figure_name, names), "not ranked because"]
    return Table("Figures by subgroup, worst first", header, rows) if rows else None


def sets(found: Study) -> Table | None:
    """Prediction sets."""
    rows = [
        (
            "by class" if each.by_class else "all classes together",
            f"{1 - each.miss:.0%}",
            with_bounds(each.coverage),
            number(each.mean_size, 2),
            with_bounds(each.single),
            with_bounds(each.empty),
        )
        for each in found.sets
    ]
    header = ["sets", "wanted", "label is in the set", "mean size", "one class", "empty"]
    return Table("Prediction sets, chosen on validation", header, rows) if rows else None


def abstaining(found: Study) -> Table | None:
    """What is gained by answering only for confident images."""
    rows = [
        (
            f"{each.risk:.0%}",
            number(each.confidence) if each.confidence is not None else "none reaches it",
            with_bounds(each.answered),
            with_bounds(each.wrong),
        )
        for each in found.abstaining.rules
    ]
    header = ["wrong at most", "confidence", "answered", "wrong among them"]
    return Table("Abstaining, chosen on validation", header, rows) if rows else None
