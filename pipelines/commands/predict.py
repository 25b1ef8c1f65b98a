"""The command predict: classifies image files with a registered model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from pipelines.commands.classify import classify
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, JsonOption, StoreOption
from pipelines.console.terminal import table


@dataclass(frozen=True)
class PredictArguments(StoreOption, JsonOption):
    """Arguments of `predict`."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files."""
    model: str = ""
    """Registered model. Empty: the only one that has the alias."""
    alias: str = "champion"
    """Alias of the version to use."""


def predict(asked: PredictArguments) -> int:
    """Prints the probability of each class for each image."""
    if not asked.images:
        raise UsageError("predict: give at least one image file")
    paths = [Path(path) for path in asked.images]
    rows = classify(paths, store=asked.open_store(), model=asked.model, alias=asked.alias)
    if asked.json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)
    return 0


def _print(rows: list[dict[str, Any]]) -> None:
    shown = []
    for row in rows:
        best = sorted(row["scores"].items(), key=lambda pair: -pair[1])
        shown.append((row["image"], row["class"], "  ".join(f"{name} {value:.3f}" for name, value in best)))
    table(f"{rows[0]['model']} version {rows[0]['version']}", ("image", "class", "probabilities"), shown)


PREDICT = Command(
    "predict",
    "Classify images with the champion model.",
    PredictArguments,
    predict,
    "Prints the probability of each class.",
)
