"""Model and test split -> metrics, predictions, and the metrics of baselines on the same images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_shards.loader import Loader
from data_shards.manifest import Dataset, open_dataset
from data_shards.store import Store
from medmamba.metrics.baselines import logistic_regression
from medmamba.metrics.classification import evaluate
from medmamba.metrics.intervals import auc_interval
from medmamba.precision import set_precision
from pipelines.cluster.board import Watch
from pipelines.faults import unwrapped
from pipelines.placement import Placement
from pipelines.scratch import scratch
from pipelines.steps.context import StepContext
from pipelines.wording import counted
from pipelines.worker.job import EvaluateJob

PREDICTIONS = "predictions.parquet"
BASELINES = {
    "pixels": "logistic regression, pixels",
    "size": "logistic regression, width and height",
    "chance": "chance (largest class)",
}
METRICS = ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1")  # of each task
_READ_AT_ONCE = 256  # images between two progress reports


class EvaluateConfig(BaseModel):
    """How a model is evaluated (`recipe.evaluate`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    micro_batch: int = Field(64, ge=1)
    """Images per forward pass; affects only speed and rounding."""
    baseline_side: int = Field(28, ge=0)
    """Image side in pixels for the baseline, a logistic regression on pixels. 0: no baselines."""
    baseline_samples: int = Field(5000, ge=10)
    """Maximum number of training images to fit the baselines on, in proportion to the classes, at least one of each."""


def run(
    config: EvaluateConfig, placement: Placement, out: Store, context: StepContext, *, shard: dict, train: dict
) -> dict:
    """Evaluates on the test split, every sample exactly once, and stores the scores as Parquet.

    Returns metrics, the interval of the AUC, the baselines (chance, logistic regression on pixels, on width and
    height), reasons for missing baselines, and where the results are stored.
    """
    dataset = context.store.at(shard["data"])
    params = config.model_dump()
    with context.tracking.running(out, run=context.run, step="evaluate", check=context.check, params=params) as run_id:
        data = open_dataset(dataset, digest=shard["digest"])
        job = EvaluateJob(
            name="evaluate",
            placement=placement,
            dataset=(dataset, shard["digest"]),
            model=(context.store.at(train["model"]), train["digest"]),
            micro_batch=config.micro_batch,
        )
        labels, logits = _infer(job, len(data.index("test")), context)
        scores = _scores(logits, data.manifest.task)
        table = _parquet(data, scores)
        out.put(PREDICTIONS, table)
        metrics = _measure(scores, labels, data.manifest.task)
        baselines, absent = _baselines(config, data, show=context.show)
        logged = {f"test_{name}": value for name, value in metrics.items()}
        for name, found in baselines.items():
            logged |= {f"baseline_{name}_{key}": value for key, value in found.items()}
        context.tracking.log_metrics(run_id, logged)
    return {
        "digest": hashlib.sha256(table).hexdigest(),
        "predictions": f"runs/{context.run}/evaluate/{PREDICTIONS}",
        "num_samples": len(labels),
        "metrics": metrics,
        "intervals": _intervals(scores, data),
        "baselines": baselines,
        "absent_baselines": absent,
        "manifest": shard["digest"],
        "mlflow_run": run_id,
    }


def evaluate_rank(job: EvaluateJob, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs in each evaluation task: the logits of its share of the test split (see `worker.inference.infer`).

    Raises CheckpointError if the digest of the model's files is not the one that the training recorded.
    """
    import torch

    from medmamba.checkpoint import load_model
    from pipelines.worker.inference import infer
    from pipelines.worker.transfer import batch_memory

    placement = job.placement
    torch.set_num_threads(placement.threads)
    set_precision("float32")  # a metric must not depend on the device it is measured on
    with job.posting_outages(), scratch("model") as folder:
        stored, digest = job.model
        _fetch(stored, folder)
        model, _, card = load_model(folder, scan=placement.scan, device=placement.device, digest=digest)
        device = torch.device(placement.device)
        loader = Loader(
            open_dataset(job.dataset[0], digest=job.dataset[1]),
            rank=rank,
            ranks=placement.workers,
            workers=placement.loader_workers,
            disk_bytes=placement.cache_bytes,
            memory=batch_memory(device),
        )
        with loader:
            return infer(
                model,
                loader,
                "test",
                micro_batch=job.micro_batch,
                image_size=card["image_size"],
                device=device,
                progress=_poster(job, rank),
            )


def _poster(job: EvaluateJob, rank: int) -> Callable[[int], None]:
    """Posts the number of images that this rank has done, a total, so that a task that runs again counts once."""
    done = 0

    def progress(images: int) -> None:
        nonlocal done
        done += images
        job.post(rank=rank, images=done)

    return progress


def _infer(job: EvaluateJob, total: int, context: StepContext) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits of the `total` samples of the test split, from as many Ray tasks as there are workers."""
    import ray

    from pipelines.worker.inference import join

    placement = job.placement
    done: dict[int, int] = {}

    def show(name: str, values: dict) -> None:
        if "outage" in values:
            context.show.progress(name, values)
            return
        done[values["rank"]] = values["images"]
        context.show.progress(name, {"done": sum(done.values()), "total": total, "unit": "images"})

    with Watch(show) as board:
        context.show.begin(f"starting {counted(placement.workers, 'evaluation task')}")
        posting = replace(job, board=board)
        gpus = 1 if placement.device == "cuda" else 0
        task = ray.remote(num_cpus=placement.cpus_per_worker, num_gpus=gpus, max_retries=2)(evaluate_rank)
        with unwrapped():
            parts = ray.get([task.remote(posting, rank) for rank in range(placement.workers)])
    return join(parts, total, "test")


def _fetch(model: Store, folder: Path) -> None:
    for name in ("weights.safetensors", "model.json"):
        (folder / name).write_bytes(model.get(name))


def _scores(logits: np.ndarray, task: str) -> np.ndarray:
    import torch

    from medmamba.loss import scores

    return scores(torch.from_numpy(logits), task).numpy()


def _measure(scores: np.ndarray, labels: np.ndarray, task: str) -> dict[str, float]:
    return evaluate(scores, labels, task)


def _parquet(data: Dataset, scores: np.ndarray) -> bytes:
    """The predictions as Parquet, one row per sample: key, group, label (class indices), scores (one per class)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = data.index("test")
    table = pa.table(
        {
            "key": pa.array(index.key.tolist()),
            "group": pa.array(index.group.tolist()),
            "label": pa.array([np.flatnonzero(row).tolist() for row in index.labels], pa.list_(pa.int32())),
            "scores": pa.array(scores.astype(np.float32).tolist(), pa.list_(pa.float32())),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _intervals(scores: np.ndarray, data: Dataset) -> dict[str, list[float]]:
    """The 95 % interval of the test AUC over resampled groups; empty if there are too few groups."""
    index = data.index("test")
    try:
        return {"auc": list(auc_interval(scores, index.labels, index.group.tolist()))}
    except ValueError:
        return {}


def _baselines(
    config: EvaluateConfig, data: Dataset, *, show: Any = None
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Metrics of the baselines on the network's splits, by name, and the reason for each missing baseline.

    Progress goes to `show`: reading and fitting may take longer than the evaluation itself.
    """
    if config.baseline_side == 0:
        return {}, {"all": "evaluate.baseline_side is 0"}
    if data.manifest.task == "multilabel":
        return {}, {"all": "not implemented for multilabel datasets"}
    found = {"chance": _chance(data)}
    absent: dict[str, str] = {}
    train, test = data.index("train"), data.index("test")
    fitted = stratified(train.labels.argmax(1), config.baseline_samples)
    wanted = [("train", fitted), ("test", np.arange(len(test)))]
    features = {"pixels": tuple(_pixels(data, wanted, config, show))}
    sizes = [np.stack([index.width, index.height], 1).astype(np.float32) for index in (train, test)]
    if sizes[0].std(0).any():
        features["size"] = (sizes[0][fitted], sizes[1])
    for done, (name, (train_x, test_x)) in enumerate(features.items()):
        if show is not None:
            show.say(f"fitting the baseline {name!r} on {len(train_x)} training images ({BASELINES[name]})")
            show.progress("fitting", {"done": done, "total": len(features), "unit": f"fitted, now {name}"})
        try:
            scores = logistic_regression(train_x, train.labels[fitted], test_x, len(data.manifest.classes))
            metrics = _measure(scores, test.labels, data.manifest.task)
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


def _pixels(
    data: Dataset, wanted: list[tuple[str, np.ndarray]], config: EvaluateConfig, show: Any
) -> Iterator[np.ndarray]:
    """Yields, for each (split, positions in it), float32 pixels (images, features) in [0, 1]."""
    done, total = 0, sum(len(index) for _, index in wanted)
    with Loader(data) as loader:
        for split, index in wanted:
            parts = []
            for first in range(0, len(index), _READ_AT_ONCE):
                at = index[first : first + _READ_AT_ONCE]
                parts.append(loader.read(split, at, image_size=config.baseline_side))
                done += len(parts[-1])
                if show is not None:
                    show.progress("baselines", {"done": done, "total": total, "unit": "images read"})
            images = np.concatenate(parts)
            yield images.reshape(len(images), -1).astype(np.float32) / 255
