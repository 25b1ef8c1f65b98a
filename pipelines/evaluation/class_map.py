"""Classes of another dataset -> those of a model: a TOML file with `"other class" = "own class"`, or "" for none."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.evaluation.predictions import StoredPredictions


def read_class_map(path: Path) -> dict[str, str]:
    """The map in a TOML file; raises ValueError if it is not one of texts to texts."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"class map {path} cannot be read: {error}") from error
    wrong = [name for name, value in found.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(
            f'class map {path}: {wrong[0]!r} is not mapped to a text; write "OTHER CLASS" = "OWN CLASS", or = "" to '
            "leave its images out"
        )
    return found


def resolve_classes(given: Mapping[str, str], others: Sequence[str], own: Sequence[str]) -> dict[str, str]:
    """Each class of the other dataset -> the model's class, or "". A class that the map leaves open keeps its name.

    Raises ValueError for a class that neither side has, and with all classes that have no counterpart.
    """
    unknown = [name for name in given if name not in others]
    if unknown:
        raise ValueError(f"class map: {_listed(unknown)} not in the dataset, whose classes are {_listed(others)}")
    wrong = sorted({name for name in given.values() if name and name not in own})
    if wrong:
        raise ValueError(f"class map: {_listed(wrong)} not a class of the model, whose classes are {_listed(own)}")
    unmapped = [name for name in others if name not in given and name not in own]
    if unmapped:
        raise ValueError(
            f"classes without a counterpart in the model: {_listed(unmapped)}; the model has {_listed(own)}: map each "
            'of them in a file for --class-map ("" leaves it out)'
        )
    return {name: given.get(name, name) for name in others}


def map_labels(labels: np.ndarray, resolved: Mapping[str, str], own: Sequence[str]) -> np.ndarray:
    """Labels (n, other classes) -> (n, own classes), 1 where any class that is mapped to it is 1."""
    mapped = np.zeros((len(labels), len(own)), np.uint8)
    for column, target in enumerate(resolved.values()):
        if target:
            mapped[:, own.index(target)] |= labels[:, column].astype(np.uint8)
    return mapped


def without_unlabeled(predictions: StoredPredictions) -> StoredPredictions:
    """The samples that are of a class of the model; multilabel: all, since none of its labels is an answer too."""
    if predictions.task == "multilabel":
        return predictions
    kept = predictions.labels.any(1)
    return dataclasses.replace(
        predictions,
        key=predictions.key[kept],
        group=predictions.group[kept],
        labels=predictions.labels[kept],
        scores=predictions.scores[kept],
        logits=None if predictions.logits is None else predictions.logits[kept],
        metadata={name: values[kept] for name, values in predictions.metadata.items()},
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
