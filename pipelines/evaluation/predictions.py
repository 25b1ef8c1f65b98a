"""The predictions of one split as Parquet: every figure of an evaluation is computed from this file alone.

Shapes: n samples, C classes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_shards.manifest import Dataset
from data_shards.store import Store

_ABOUT = b"medmamba.predictions"
_COLUMNS = ("key", "group", "label", "scores", "logits")


@dataclass(frozen=True)
class StoredPredictions:
    """What one model predicts for the samples of one split, with what is known of each sample."""

    key: npt.NDArray[Any]
    """(n,) the samples' keys."""
    group: npt.NDArray[Any]
    """(n,) the patient or another group that is never divided between splits."""
    labels: npt.NDArray[np.uint8]
    """(n, C) 1 where the sample is of the class."""
    scores: npt.NDArray[np.float32]
    """(n, C) probabilities, uncalibrated."""
    logits: npt.NDArray[np.float32] | None
    """(n, C) what the probabilities were computed from; None in files of earlier releases."""
    task: str
    classes: tuple[str, ...]
    split: str
    manifest: str
    """Digest of the dataset's manifest."""
    model: str
    """Digest of the model."""
    metadata: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Column -> (n,) values: height, width and channels, and the columns kept from the source table."""

    def __len__(self) -> int:
        return len(self.key)


def stored_predictions(
    data: Dataset,
    split: str,
    logits: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    *,
    model: str,
    metadata: Mapping[str, npt.NDArray[Any]] | None = None,
) -> StoredPredictions:
    """Predictions for a split of a dataset, whose rows have the order of its index."""
    index = data.index(split)
    sizes = {name: getattr(index, name) for name in ("height", "width", "channels")}
    return StoredPredictions(
        key=index.key,
        group=index.group,
        labels=index.labels,
        scores=scores.astype(np.float32),
        logits=logits.astype(np.float32),
        task=data.manifest.task,
        classes=tuple(data.manifest.classes),
        split=split,
        manifest=data.digest,
        model=model,
        metadata={**sizes, **(metadata or {})},
    )


def to_parquet(predictions: StoredPredictions) -> bytes:
    """A row per sample: key, group, label (list of class indices), scores and logits (lists), metadata columns.

    Task, classes, split and the digests of manifest and model are in the schema's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "key": pa.array(predictions.key.tolist()),
        "group": pa.array(predictions.group.tolist()),
        "label": pa.array([np.flatnonzero(row).tolist() for row in predictions.labels], pa.list_(pa.int32())),
        "scores": pa.array(predictions.scores.tolist(), pa.list_(pa.float32())),
    }
    if predictions.logits is not None:
        columns["logits"] = pa.array(predictions.logits.tolist(), pa.list_(pa.float32()))
    columns |= {name: pa.array(np.asarray(values).tolist()) for name, values in predictions.metadata.items()}
    about = {name: getattr(predictions, name) for name in ("task", "classes", "split", "manifest", "model")}
    table = pa.table(columns).replace_schema_metadata({_ABOUT: json.dumps(about)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def from_parquet(data: bytes, *, otherwise: Mapping[str, Any] | None = None) -> StoredPredictions:
    """The predictions of a file. `otherwise` has task, classes, split, manifest and model for files of earlier
    releases, which do not name them.

    Raises ValueError where the file is not one of predictions.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
        about = json.loads((table.schema.metadata or {}).get(_ABOUT, b"null")) or dict(otherwise or {})
        scores = np.array(table["scores"].to_pylist(), np.float32).reshape(len(table), len(about["classes"]))
        labels = _multi_hot(table["label"].to_pylist(), scores.shape[1])
        logits = None
        if "logits" in table.column_names:
            logits = np.array(table["logits"].to_pylist(), np.float32).reshape(scores.shape)
        return StoredPredictions(
            key=np.array(table["key"].to_pylist()),
            group=np.array(table["group"].to_pylist()),
            labels=labels,
            scores=scores,
            logits=logits,
            task=about["task"],
            classes=tuple(about["classes"]),
            split=about["split"],
            manifest=about["manifest"],
            model=about["model"],
            metadata={name: np.array(table[name].to_pylist()) for name in table.column_names if name not in _COLUMNS},
        )
    except (pa.ArrowException, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"not a file of predictions ({' '.join(str(error).split())[:120]}): run `medmamba evaluate` again"
        ) from error


def read_predictions(
    store: Store, key: str, *, digest: str = "", otherwise: Mapping[str, Any] | None = None
) -> StoredPredictions:
    """The predictions stored under `key`.

    Raises ValueError where they are damaged or have another digest than `digest`, which an evaluation recorded.
    """
    data = store.get(key)
    found = hashlib.sha256(data).hexdigest()
    if digest and found != digest:
        raise ValueError(
            f"{store.uri}/{key} has the digest {found[:12]}, but its evaluation recorded {digest[:12]}: it was changed "
            "afterwards; restore it, or evaluate under another run"
        )
    return from_parquet(data, otherwise=otherwise)


def _multi_hot(labels: Sequence[Sequence[int]], num_classes: int) -> npt.NDArray[np.uint8]:
    hot = np.zeros((len(labels), num_classes), np.uint8)
    for row, indices in zip(hot, labels, strict=True):
        row[list(indices)] = 1
    return hot
