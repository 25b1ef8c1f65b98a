"""Predictions that were never made by a network: right more often than not, of patients with several images."""

from __future__ import annotations

import numpy as np

from pipelines.evaluation.predictions import StoredPredictions


def drawn(
    names, *, task="multiclass", num=600, split="test", seed=0, weak_site=False, model="w" * 64
) -> StoredPredictions:
    draw, classes = np.random.default_rng(seed), len(names)
    site = draw.choice(["north", "south"], num)
    if task == "multilabel":
        labels = (draw.random((num, classes)) < 0.3).astype(np.uint8)
        logits = (2.0 * labels - 1) + draw.normal(0, 1.5, labels.shape)
        scores = 1 / (1 + np.exp(-logits))
    else:
        labels = np.eye(classes, dtype=np.uint8)[np.arange(num) % classes]
        weight = np.where(site == "south", 0.0, 3.0)[:, None] if weak_site else 3.0
        logits = labels * weight + draw.normal(0, 1.2, labels.shape)
        scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return StoredPredictions(
        key=np.array([f"{i:020x}" for i in range(num)]),
        group=np.array([f"{i % 100:020x}" for i in range(num)]),
        labels=labels,
        scores=scores.astype(np.float32),
        logits=logits.astype(np.float32),
        task=task,
        classes=tuple(names),
        split=split,
        manifest="m" * 64,
        model=model,
        metadata={"site": site},
    )
