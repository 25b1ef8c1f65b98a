"""What simpler means reach on the test split: chance, and logistic regressions on pixels and on image sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_shards.loader import Loader
from data_shards.manifest import Dataset
from medmamba.metrics.baselines import logistic_regression
from medmamba.metrics.classification import evaluate

BASELINES = {
    "pixels": "logistic regression, pixels",
    "size": "logistic regression, width and height",
    "chance": "chance (largest class)",
}
METRICS = ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1")  # of each task
_READ_AT_ONCE = 256  # images between two progress reports


def measure_baselines(
    data: Dataset, *, side: int, num_samples: int, show: Any = None
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Metrics of the baselines on the network's splits, by name, and the reason for each missing baseline.

    `side` is that of the images in pixels, 0 for no baselines; `num_samples` the most training images to fit on.
    Progress goes to `show`: reading and fitting may take longer than the evaluation itself.
    """
    if side == 0:
        return {}, {"all": "evaluate.baseline_side is 0"}
    if data.manifest.task == "multilabel":
        return {}, {"all": "not implemented for multilabel datasets"}
    found = {"chance": _chance(data)}
    absent: dict[str, str] = {}
    train, test = data.index("train"), data.index("test")
    fitted = stratified(train.labels.argmax(1), num_samples)
    wanted = [("train", fitted), ("test", np.arange(len(test)))]
    features = {"pixels": tuple(_pixels(data, wanted, side, show))}
    sizes = [np.stack([index.width, index.height], 1).astype(np.float32) for index in (train, test)]
    if sizes[0].std(0).any():
        features["size"] = (sizes[0][fitted], sizes[1])
    for done, (name, (train_x, test_x)) in enumerate(features.items()):
        if show is not None:
            show.say(f"fitting the baseline {name!r} on {len(train_x)} training images ({BASELINES[name]})")
            show.progress("fitting", {"done": done, "total": len(features), "unit": f"fitted, now {name}"})
        try:
            scores = logistic_regression(train_x, train.labels[fitted], test_x, len(data.manifest.classes))
            metrics = evaluate(scores, test.labels, data.manifest.task)
        except ValueError as error:  # a baseline that fails must not lose the evaluation
            absent[name] = str(error)
            continue
        found[name] = {key: metrics[key] for key in METRICS}
    return found, absent


def _chance(data: Dataset) -> dict[str, float]:
    """Test metrics of always predicting the largest class of the training split; its AUC is 0.5."""
    num = len(data.manifest.classes)
    share = _majority_accuracy(data)
    return {
        "auc": 0.5,
        "accuracy": share,
        "balanced_accuracy": 1 / num,
        "sensitivity": 1 / num,
        "specificity": (num - 1) / num,
        "f1": 2 * share / (1 + share) / num,
    }


def stratified(classes_n: np.ndarray, at_most: int) -> np.ndarray:
    """Sorted positions of about `at_most` samples: the first ones of each class, in proportion, at least one.

    The samples of a split are shuffled, so the first ones are a random choice.
    """
    if len(classes_n) <= at_most:
        return np.arange(len(classes_n))
    chosen = []
    for number in np.unique(classes_n):
        members = np.flatnonzero(classes_n == number)
        chosen.append(members[: max(1, len(members) * at_most // len(classes_n))])
    return np.sort(np.concatenate(chosen))


def _majority_accuracy(data: Dataset) -> float:
    majority = data.index("train").labels.sum(0).argmax()
    return float(data.index("test").labels[:, majority].mean())


def _pixels(data: Dataset, wanted: list[tuple[str, np.ndarray]], side: int, show: Any) -> Iterator[np.ndarray]:
    """Yields, for each (split, positions in it), float32 pixels (images, features) in [0, 1]."""
    done, total = 0, sum(len(index) for _, index in wanted)
    with Loader(data) as loader:
        for split, index in wanted:
            parts = []
            for first in range(0, len(index), _READ_AT_ONCE):
                at = index[first : first + _READ_AT_ONCE]
                parts.append(loader.read(split, at, image_size=side))
                done += len(parts[-1])
                if show is not None:
                    show.progress("baselines", {"done": done, "total": total, "unit": "images read"})
            images = np.concatenate(parts)
            yield images.reshape(len(images), -1).astype(np.float32) / 255
