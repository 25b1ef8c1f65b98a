"""Predictions are written and read back without loss; files of earlier releases are read too."""

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.store import open_store
from pipelines.evaluation.predictions import StoredPredictions, from_parquet, read_predictions, to_parquet

ABOUT = {"task": "multilabel", "classes": ("a", "b", "c"), "split": "test", "manifest": "m" * 64, "model": "w" * 64}


def made(num=7, **other):
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(num, 3)).astype(np.float32)
    return StoredPredictions(
        key=np.array([f"{i:020x}" for i in range(num)]),
        group=np.array([f"{i // 2:020x}" for i in range(num)]),
        labels=draw.integers(0, 2, (num, 3)).astype(np.uint8),
        scores=(1 / (1 + np.exp(-logits))).astype(np.float32),
        logits=logits,
        metadata={"height": np.arange(num), "site": np.array([None, "x", "y"] * 3, object)[:num]},
        **{**ABOUT, **other},
    )


@pytest.mark.parametrize("num", [0, 1, 7])
def test_predictions_come_back_as_they_were(num):
    written = made(num)
    read = from_parquet(to_parquet(written))
    for name in ("key", "group", "labels", "scores", "logits"):
        assert getattr(read, name).tolist() == getattr(written, name).tolist(), name
        assert getattr(read, name).shape == getattr(written, name).shape or num == 0
    assert {name: getattr(read, name) for name in ABOUT} == ABOUT
    assert {name: values.tolist() for name, values in read.metadata.items()} == {
        name: values.tolist() for name, values in written.metadata.items()
    }


def test_the_same_predictions_give_the_same_bytes():
    assert to_parquet(made()) == to_parquet(made())


def test_a_file_of_an_earlier_release_is_read():
    table = pa.table({"key": ["a" * 20], "group": ["b" * 20], "label": [[1]], "scores": [[0.25, 0.75, 0.0]]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    read = from_parquet(buffer.getvalue(), otherwise=ABOUT)
    assert read.logits is None
    assert read.labels.tolist() == [[0, 1, 0]]
    assert read.classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="not a file of predictions"):
        from_parquet(buffer.getvalue())


@pytest.mark.parametrize("damage", [b"", b"PAR1 but nothing else", None])
def test_a_damaged_file_is_refused(damage, tmp_path):
    store = open_store(str(tmp_path))
    data = to_parquet(made())
    store.put("p.parquet", data[: len(data) // 2] if damage is None else damage)
    with pytest.raises(ValueError, match="not a file of predictions"):
        read_predictions(store, "p.parquet")


def test_a_label_that_is_no_class_is_refused():
    table = pa.table({"key": ["a" * 20], "group": ["b" * 20], "label": [[3]], "scores": [[0.25, 0.75, 0.0]]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with pytest.raises(ValueError, match="not a file of predictions"):
        from_parquet(buffer.getvalue(), otherwise=ABOUT)


def test_a_changed_file_is_noticed_by_its_digest(tmp_path):
    store = open_store(str(tmp_path))
    store.put("p.parquet", to_parquet(made()))
    other = dataclasses.replace(made(), model="v" * 64)
    with pytest.raises(ValueError, match="was changed afterwards"):
        read_predictions(store, "p.parquet", digest="0" * 64)
    store.put("q.parquet", to_parquet(other))
    assert read_predictions(store, "q.parquet").model == "v" * 64
