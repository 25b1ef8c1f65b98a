"""Model and test split -> metrics, predictions, and the metrics of baselines on the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_shards.loader import Loader
from data_shards.manifest import Dataset, open_dataset
from data_shards.store import Store
from medmamba.metrics.classification import evaluate
from medmamba.precision import set_precision
from pipelines.cluster.board import Watch
from pipelines.evaluation.files import CALIBRATION, FILES, PREDICTIONS, STUDY
from pipelines.faults import unwrapped
from pipelines.placement import Placement
from pipelines.scratch import scratch
from pipelines.steps.baselines import measure_baselines
from pipelines.steps.context import StepContext
from pipelines.wording import counted
from pipelines.worker.job import EvaluateJob

if TYPE_CHECKING:
    from pipelines.evaluation.predictions import StoredPredictions

SPLITS = ("val", "test")
"""Validation is predicted too: calibration and thresholds are chosen on it."""


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
    """Evaluates on the test split, every sample exactly once.

    Stores the predictions of test and validation, the study of them (`pipelines.evaluation.study`) and what was
    calibrated on validation. Returns metrics with their intervals, the baselines (chance, logistic regression on
    pixels, on width and height), reasons for missing baselines, and where the results are stored.
    """
    from pipelines.evaluation.study import logged_figures, study

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
        stored = _predict(job, data, out, context)
        found, calibrator = study(stored["test"], stored["val"])
        out.put(STUDY, found.model_dump_json(indent=1).encode())
        if calibrator is not None:
            out.put(CALIBRATION, calibrator.to_json())
        metrics = evaluate(stored["test"].scores, stored["test"].labels, data.manifest.task)
        baselines, absent = measure_baselines(
            data, side=config.baseline_side, num_samples=config.baseline_samples, show=context.show
        )
        logged = {f"test_{name}": value for name, value in metrics.items()} | logged_figures(found)
        for name, figures in baselines.items():
            logged |= {f"baseline_{name}_{key}": value for key, value in figures.items()}
        context.tracking.log_metrics(run_id, logged)
    place = f"runs/{context.run}/evaluate"
    return {
        "digest": hashlib.sha256(out.get(PREDICTIONS)).hexdigest(),
        "predictions": f"{place}/{PREDICTIONS}",
        "study": f"{place}/{STUDY}",
        "calibration": f"{place}/{CALIBRATION}" if calibrator is not None else "",
        "num_samples": len(stored["test"]),
        "metrics": metrics,
        "intervals": {
            name: [each.low, each.high]
            for name, each in found.macro.items()
            if name in metrics and each.low is not None
        },
        "baselines": baselines,
        "absent_baselines": absent,
        "manifest": shard["digest"],
        "mlflow_run": run_id,
    }


def _predict(job: EvaluateJob, data: Dataset, out: Store, context: StepContext) -> dict[str, StoredPredictions]:
    """The predictions of each split, which are stored too."""
    from pipelines.evaluation.predictions import from_parquet, stored_predictions, to_parquet

    totals = {split: len(data.index(split)) for split in SPLITS}
    found = {}
    for split, logits in _infer(job, totals, context).items():
        scores = _scores(logits, data.manifest.task)
        table = to_parquet(
            stored_predictions(data, split, logits, scores, model=job.model[1], metadata=data.metadata(split))
        )
        out.put(FILES[split], table)
        # Read back, so that the figures are those of the file.
        found[split] = from_parquet(table)
    return found


def evaluate_rank(job: EvaluateJob, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Runs in each evaluation task: split -> the logits of its share (see `worker.inference.infer`).

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
        progress = _poster(job, rank)
        with loader:
            return {
                split: infer(
                    model,
                    loader,
                    split,
                    micro_batch=job.micro_batch,
                    image_size=card["image_size"],
                    device=device,
                    progress=progress,
                )
                for split in SPLITS
            }


def _poster(job: EvaluateJob, rank: int) -> Callable[[int], None]:
    """Posts the number of images that this rank has done, a total, so that a task that runs again counts once."""
    done = 0

    def progress(images: int) -> None:
        nonlocal done
        done += images
        job.post(rank=rank, images=done)

    return progress


def _infer(job: EvaluateJob, totals: dict[str, int], context: StepContext) -> dict[str, np.ndarray]:
    """Split -> logits of its samples, of which there are `totals`, from as many Ray tasks as there are workers."""
    import ray

    from pipelines.worker.inference import join

    placement = job.placement
    done: dict[int, int] = {}
    total = sum(totals.values())

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
    return {split: join([part[split] for part in parts], num, split)[1] for split, num in totals.items()}


def _fetch(model: Store, folder: Path) -> None:
    for name in ("weights.safetensors", "model.json"):
        (folder / name).write_bytes(model.get(name))


def _scores(logits: np.ndarray, task: str) -> np.ndarray:
    import torch

    from medmamba.loss import scores

    return scores(torch.from_numpy(logits), task).numpy()
