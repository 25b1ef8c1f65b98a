"""The predictions of a run, by the keys of its test images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from data_shards.manifest import Dataset
from data_shards.store import Store, StoreKeyError
from pipelines.console.arguments import UsageError
from pipelines.flow.record import read_record


class Predicted(NamedTuple):
    """What a run predicts for one image."""

    predicted: str
    """The class with the highest score; multilabel: all classes of 0.5 or more, joined by `|`."""
    score: float
    """The highest score."""
    correct: bool


def read_predicted(store: Store, run: str, dataset: Dataset) -> dict[str, Predicted]:
    """The predictions of a run's test images, by key.

    Raises UsageError if the run has none, or was evaluated on another dataset.
    """
    import pyarrow.parquet as pq

    record = read_record(store.at("runs", run, "evaluate"))
    if record is None:
        raise UsageError(
            f"run {run!r} of {store.uri} has no predictions; make them with `medmamba evaluate --run {run}`"
        )
    if record.facts["manifest"] != dataset.digest:
        raise UsageError(
            f"run {run!r} was evaluated on another dataset than {dataset.store.uri}; leave the dataset out to use the "
            "run's own"
        )
    try:
        found = pq.read_table(io.BytesIO(store.get(record.facts["predictions"])))
    except StoreKeyError as error:
        raise UsageError(
            f"the predictions of run {run!r} are missing ({error}); evaluate under another --run NAME"
        ) from None
    columns = (found[name].to_pylist() for name in ("key", "label", "scores"))
    several, classes = dataset.manifest.task == "multilabel", dataset.manifest.classes
    return {key: _predicted(label, scores, classes, several) for key, label, scores in zip(*columns, strict=True)}


def _predicted(label: Sequence[int], scores: Sequence[float], classes: Sequence[str], several: bool) -> Predicted:
    best = max(range(len(scores)), key=scores.__getitem__)
    chosen = [i for i, score in enumerate(scores) if score >= 0.5] if several else [best]
    return Predicted("|".join(classes[i] for i in chosen), float(scores[best]), chosen == sorted(label))
