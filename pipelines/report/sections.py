"""The sections of a run's page, from its records."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.report import described, plots, tables, training_plots
from pipelines.report.checklist import filled
from pipelines.report.parts import Example, Figure, Section, Table
from pipelines.report.records import RunRecords
from pipelines.report.words import NOT_STATED, number, with_bounds


def sections(run: RunRecords, examples: Sequence[Example], no_examples: str) -> list[Section]:
    """All of them, in the order of the page."""
    found = run.study
    return [
        Section(
            "summary",
            "Summary",
            text=[text for text in (found.sample_size, described.weakest(found)) if text],
            tables=_some(tables.key_figures(found), tables.baselines(run)),
        ),
        Section(
            "classes",
            "Classes",
            tables=[tables.by_class(found)],
            figures=[plots.confusion(found), plots.roc(found), plots.precision_recall(found)],
        ),
        _calibration(run),
        _uncertain(run),
        _subgroups(run),
        _images(examples, no_examples),
        *_data(run),
        _training(run),
        Section("versions", "Versions", facts=described.versions(run)),
        Section("intended-use", "Intended use", text=[described.INTENDED_USE]),
        Section("limits", "Limits", points=described.limits(run)),
        _guidelines(run),
    ]


def _some(*found: Table | None) -> list[Table]:
    return [table for table in found if table is not None]


def _calibration(run: RunRecords) -> Section:
    part = run.study.calibration
    text = [f"Expected calibration error of the raw scores: {with_bounds(part.raw.error)}."]
    if part.calibrated is not None and part.temperature is not None:
        text.append(
            f"With the temperature {number(part.temperature)}, fitted on validation: "
            f"{with_bounds(part.calibrated.error)}."
        )
    else:
        text.append(f"Not calibrated: {run.study.absent.get('validation', NOT_STATED)}.")
    figures = [plots.reliability(run.study), plots.decision(run.study)]
    points = tables.operating_points(run.study)
    if points is None:
        text.append("No operating points: they are chosen on validation.")
    return Section("calibration", "Calibration and operating points", text, tables=_some(points), figures=figures)


def _uncertain(run: RunRecords) -> Section:
    found = run.study
    if found.foreign is not None:
        text = f"{with_bounds(found.foreign.flagged)} of the test images have less evidence for any class than 95 % of "
        text += "validation (energy): about 0.05 is expected of images of the same kind."
    else:
        text = f"Images of another kind: {found.absent.get('foreign', NOT_STATED)}."
    shown = _some(tables.sets(found), tables.abstaining(found))
    return Section(
        "uncertainty",
        "Prediction sets and abstaining",
        [text] if shown else [text, "Sets and confidences are chosen on validation, which has no predictions here."],
        tables=shown,
        figures=[plots.risk_coverage(found)],
    )


def _subgroups(run: RunRecords) -> Section:
    table, figure = tables.subgroups(run.study), plots.forest(run.study)
    more = len(run.study.subgroups) - tables.MOST_SUBGROUPS
    text = [] if table else ["No column of the dataset has two values or more, so there are no subgroups."]
    text += [f"{more} more subgroups are in evaluation.json."] if more > 0 else []
    return Section("subgroups", "Subgroups", text, tables=_some(table), figures=[figure] if figure else [])


def _images(found: Sequence[Example], reason: str) -> Section:
    if not found:
        return Section("images", "Images", [f"None: {reason}."])
    text = (
        "Grad-CAM maps of the predicted class: yellow where a branch of the network supports it most. A map shows "
        "where the network looks, not why, and does not prove that it looks at the finding."
    )
    return Section("images", "Images", [text], examples=found)


def _data(run: RunRecords) -> list[Section]:
    facts = described.duplicates(run)
    return [
        Section("data", "Data", facts=described.data(run), tables=[tables.counts(run)]),
        Section("duplicates", "Duplicates", facts=facts),
    ]


def _training(run: RunRecords) -> Section:
    trained, tuned = run.facts("train"), run.facts("tune")
    drawn: list[Figure | None] = [training_plots.epochs(trained.get("history", []), trained.get("best_epoch", 0))]
    if tuned:
        drawn.append(training_plots.trials(tuned.get("trials", []), tuned.get("winner_number", 0)))
    table = Table("Hyperparameters", ["key", "value"], described.hyperparameters(run), "keys")
    return Section(
        "training",
        "Training",
        facts=described.training(run),
        figures=[figure for figure in drawn if figure],
        tables=[table] if table.rows else [],
    )


def _guidelines(run: RunRecords) -> Section:
    rows = [
        (each["item"], each["tripod_ai"] or "–", each["claim"] or "–", each["answer"])
        for each in filled(described.answers(run))
    ]
    table = Table("Items and what the records say", ["item", "TRIPOD+AI", "CLAIM 2020", "answer"], rows, "words")
    text = "What the records of the run can fill; the authors of a study must state the rest."
    return Section("guidelines", "Reporting guidelines: TRIPOD+AI and CLAIM", [text], tables=[table])
