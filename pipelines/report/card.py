"""The model card of a run as JSON and as Markdown, in the sections of Mitchell et al. (arXiv 1810.03993)."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

from pipelines.report import described, tables
from pipelines.report.checklist import filled
from pipelines.report.parts import Table
from pipelines.report.records import RunRecords
from pipelines.report.words import NOT_STATED


def card(run: RunRecords) -> dict[str, Any]:
    """The card as plain JSON values."""
    found = run.study
    return {
        "format": 1,
        "run": run.run,
        "summary": described.verdict(run),
        "model_details": {
            "network": (run.model_card or {}).get("config", {}),
            "task": found.task,
            "classes": found.classes,
            "digest": found.model,
            "training": dict(described.training(run)),
            "hyperparameters": dict(described.hyperparameters(run)),
            "versions": dict(described.versions(run)),
        },
        "intended_use": described.INTENDED_USE,
        "factors": [f"{each.column} = {each.value}" for each in found.subgroups],
        "metrics": {name: each.model_dump() for name, each in found.macro.items()},
        "metrics_by_class": {
            each.name: {
                "images": each.support,
                "figures": {name: value.model_dump() for name, value in each.figures.items()},
            }
            for each in found.by_class
        },
        "sample_size": found.sample_size,
        "calibration": {
            "temperature": found.calibration.temperature,
            "error_raw": found.calibration.raw.error.model_dump(),
            "error_calibrated": found.calibration.calibrated.error.model_dump()
            if found.calibration.calibrated
            else None,
        },
        "data": dict(described.data(run)),
        "duplicates": dict(described.duplicates(run)),
        "ethical_considerations": NOT_STATED,
        "limits": described.limits(run),
        "guidelines": filled(described.answers(run)),
    }


def to_json(found: dict[str, Any]) -> bytes:
    """The file card.json."""
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def to_markdown(run: RunRecords) -> bytes:
    """The file card.md."""
    found = run.study
    parts = [
        f"# Model card: {_text(run.run)}",
        _text(described.verdict(run)),
        _text(f"{found.sample_size} {described.weakest(found)}".strip()),
        "## Model details",
        _facts([("Task", found.task), ("Classes", ", ".join(found.classes)), *described.training(run)]),
        "## Intended use",
        _text(described.INTENDED_USE),
        "## Metrics",
        *[_table(each) for each in (tables.key_figures(found), tables.by_class(found), tables.baselines(run)) if each],
        *[_table(each) for each in (tables.operating_points(found),) if each],
        "## Factors",
        *[_table(each) if each else NOT_STATED for each in (tables.subgroups(found),)],
        "## Training and evaluation data",
        _facts(described.data(run)),
        _table(tables.counts(run)),
        "### Duplicates",
        _facts(described.duplicates(run)),
        "## Ethical considerations",
        NOT_STATED,
        "## Limits",
        "\n".join(f"- {_text(each)}" for each in described.limits(run)),
        "## Reporting guidelines",
        _table(_guidelines(run)),
        "## Versions",
        _facts(described.versions(run)),
    ]
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def _guidelines(run: RunRecords) -> Table:
    items = filled(described.answers(run))
    rows = [tuple(each[key] or "–" for key in ("item", "tripod_ai", "claim", "answer")) for each in items]
    return Table("TRIPOD+AI and CLAIM 2020", ["item", "TRIPOD+AI", "CLAIM 2020", "answer"], rows, "words")


def _table(table: Table) -> str:
    lines = [_row(table.header), _row(["---"] * len(table.header)), *map(_row, table.rows)]
    return f"{_text(table.caption)}:\n\n" + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell if cell == '---' else _text(cell) for cell in cells)} |"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {_text(term)}: {_text(stated)}" for term, stated in facts)


def _text(text: str) -> str:
    """Text that Markdown shows as it is: names of classes may have its marks, or HTML's."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
