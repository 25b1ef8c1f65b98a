"""An evaluated run in a store, made of drawn predictions: records as the steps write them, without Ray and training."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.store import Store, open_store
from pipelines.evaluation.files import PREDICTIONS, STUDY, VALIDATION
from pipelines.evaluation.predictions import StoredPredictions, from_parquet, to_parquet
from pipelines.evaluation.study import study
from pipelines.flow.record import Identity, Record, write_identity, write_record

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "a'b\"c&d | `e` *f* [g](http://example.org/) $x^{2$ {{ 7 * 7 }}",
    "ein sehr langer Name " * 8,
    "肺炎 \u202eevil\u202c – ä\u0000\n2",
)


def drawn(classes: tuple[str, ...], task: str = "multiclass", *, seed: int = 0, **other: Any) -> StoredPredictions:
    """Predictions of a network that is right more often than not."""
    draw, num, width = np.random.default_rng(seed), 120, len(classes)
    if task == "multilabel":
        labels = draw.integers(0, 2, (num, width))
        logits = (2 * labels - 1 + draw.normal(0, 1.5, (num, width))) * 2
        scores = 1 / (1 + np.exp(-logits))
    else:
        labels = np.eye(width, dtype=np.int64)[draw.integers(0, width, num)]
        logits = (labels + draw.normal(0, 0.8, (num, width))) * 3
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    fields = {
        "key": np.array([f"{at:020x}" for at in range(num)]),
        "group": np.array([f"{at // 2:020x}" for at in range(num)]),
        "labels": labels.astype(np.uint8),
        "scores": scores.astype(np.float32),
        "logits": logits.astype(np.float32),
        "task": task,
        "classes": classes,
        "split": "test",
        "manifest": "5" * 64,
        "model": "w" * 64,
        "metadata": {"site": np.array(["north", "<b>south</b>"])[draw.integers(0, 2, num)]},
    }
    return StoredPredictions(**{**fields, **other})


def store_run(
    folder: Path,
    run: str = "r",
    classes: tuple[str, ...] = ("a", "b", "c"),
    task: str = "multiclass",
    *,
    seed: int = 0,
    manifest: str = "5" * 64,
    validated: bool = True,
    with_study: bool = True,
) -> Store:
    """The store of an evaluated run. Without `validated` and `with_study` it is as an earlier release left it."""
    store = open_store(str(folder))
    test = drawn(classes, task, manifest=manifest)
    noise = np.random.default_rng(seed).normal(0, 0.3, test.scores.shape) if seed else 0
    logits = (test.logits + noise).astype(np.float32)
    test = drawn(classes, task, manifest=manifest, logits=logits, scores=_scores(logits, task))
    validation = drawn(classes, task, seed=1, split="val", manifest=manifest) if validated else None
    out, data = store.at("runs", run, "evaluate"), to_parquet(test)
    out.put(PREDICTIONS, data)
    if validation is not None:
        out.put(VALIDATION, to_parquet(validation))
    if with_study:
        validation = None if validation is None else from_parquet(to_parquet(validation))
        out.put(STUDY, study(from_parquet(data), validation)[0].model_dump_json().encode())
    for step, facts in _facts(run, classes, manifest, hashlib.sha256(data).hexdigest()).items():
        _record(store, run, step, facts)
    return store


def _scores(logits: np.ndarray, task: str) -> np.ndarray:
    if task == "multilabel":
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    scores = np.exp(logits - logits.max(1, keepdims=True))
    return (scores / scores.sum(1, keepdims=True)).astype(np.float32)


def _facts(run: str, classes: tuple[str, ...], manifest: str, digest: str) -> dict[str, dict[str, Any]]:
    epochs = [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 1.2 / epoch, "val_auc": 0.5 + epoch / 10}
        for epoch in (1, 2, 3)
    ]
    trial = {"trial": "t", "epochs": 2, "stopped_early": False, "error": None}
    return {
        "shard": {
            "digest": manifest,
            "data": "datasets/own/default",
            "dataset": "own",
            "counts": {split: dict.fromkeys(classes, 40) for split in ("train", "val", "test")},
            "samples": {"train": 400, "val": 120, "test": 120},
            "num_images": 640,
            "num_shards": 3,
            "quarantine": 2,
        },
        "tune": {
            "digest": "t",
            "winner": {"train.optim.lr": 0.01},
            "winner_number": 2,
            "trials": [
                {**trial, "number": n, "overrides": {"train.optim.lr": n / 100}, "metrics": {"best_auc": 0.6 + n / 10}}
                for n in (1, 2)
            ],
        },
        "train": {
            "digest": "w" * 64,
            "model": f"runs/{run}/train/model",
            "best_epoch": 3,
            "epochs": 3,
            "metrics": epochs[-1],
            "history": epochs,
            "resolved": {"train": {"batch_size": 8, "optim": {"lr": 0.01}}},
            "usage": {"total_s": 3661.0, "gpu_hours": 1.5, "price_usd": 6.0, "gpus": {"NVIDIA H200": 5400.0}},
        },
        "evaluate": {
            "digest": digest,
            "predictions": f"runs/{run}/evaluate/{PREDICTIONS}",
            "num_samples": 120,
            "metrics": {"auc": 0.9},
            "baselines": {"chance": {"auc": 0.5, "accuracy": 0.3}},
        },
    }


def _record(store: Store, run: str, step: str, facts: dict[str, Any]) -> None:
    out = store.at("runs", run, step)
    write_identity(out, Identity({"source": "<i>folder</i>", "layout": "folders"} if step == "shard" else {}, {}))
    record = Record(
        facts=facts,
        inputs={},
        seconds=12.0,
        started="2026-12-01T10:00:00.000+00:00",
        finished="2026-12-01T10:01:00.000+00:00",
        placement={"device": "cuda", "workers": 2, "nodes": 1},
        git_commit="c" * 40,
        packages={"python": "3.12.1", "torch": "2.11.0"},
    )
    write_record(out, record)
