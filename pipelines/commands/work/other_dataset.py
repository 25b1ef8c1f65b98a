"""`medmamba evaluate --run R --on DATASET`: the model of a run on another dataset, outside the workflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.loader import Loader
from data_shards.manifest import Dataset, open_dataset
from data_shards.store import Store
from pipelines.commands.shards.owner import dataset_in
from pipelines.commands.study.tables import print_study
from pipelines.commands.work.options import EvaluateWork
from pipelines.console.arguments import UsageError
from pipelines.console.command import open_named
from pipelines.console.terminal import console
from pipelines.evaluation.files import PREDICTIONS, STUDY, VALIDATION
from pipelines.flow.record import read_record
from pipelines.scratch import scratch


def evaluate_on(work: EvaluateWork[Any, Any]) -> int:
    """Predicts the split of the other dataset, stores predictions and study, and prints them; returns 0."""
    from pipelines.evaluation.predictions import read_predictions, to_parquet
    from pipelines.evaluation.study import study

    store = open_named(work.store)
    train, evaluate = (_facts(store, work.run, step) for step in ("train", "evaluate"))
    data = open_dataset(dataset_in(store, work.on))
    if work.split not in data.manifest.splits:
        raise UsageError(f"--split {work.split}: {data.store.uri} has {', '.join(data.manifest.splits)}")
    test = _predict(work, store, train, data)
    validation = None
    if evaluate.get("study"):
        validation = read_predictions(store, f"runs/{work.run}/evaluate/{VALIDATION}")
    found, _ = study(test, validation, on_other_data=True)
    name = data.store.uri.removeprefix(f"{store.uri}/datasets/").replace("/", "-")
    folder = f"runs/{work.run}/evaluate-on-{name}{'' if work.split == 'test' else f'-{work.split}'}"
    store.put(f"{folder}/{PREDICTIONS}", to_parquet(test))
    store.put(f"{folder}/{STUDY}", found.model_dump_json(indent=1).encode())
    if work.json:
        facts = {"predictions": f"{folder}/{PREDICTIONS}", "study": f"{folder}/{STUDY}"}
        print(json.dumps(facts | {"evaluation": found.model_dump(mode="json")}, indent=2))
        return 0
    left_out = len(data.index(work.split)) - len(test)
    console().print(f"run {work.run} on {work.split} of {name}: {len(test):,} images, {left_out:,} left out")
    print_study(found)
    console().print(f"complete study: {store.uri}/{folder}/{STUDY}", soft_wrap=True)
    return 0


def _facts(store: Store, run: str, step: str) -> dict[str, Any]:
    record = read_record(store.at("runs", run, step))
    if record is None:
        raise UsageError(f"evaluate --on: run {run!r} has no finished step {step}; run `medmamba evaluate --run {run}`")
    return record.facts


def _predict(work: EvaluateWork[Any, Any], store: Store, train: dict[str, Any], data: Dataset) -> Any:
    """The predictions of the split, with the model's classes, less the images that the class map leaves out."""
    import torch

    from medmamba.checkpoint import load_model
    from medmamba.config import MODEL, WEIGHTS
    from medmamba.loss import scores
    from medmamba.precision import set_precision
    from pipelines.evaluation.class_map import map_labels, read_class_map, resolve_classes, without_unlabeled
    from pipelines.evaluation.predictions import StoredPredictions
    from pipelines.worker.inference import infer, join

    set_precision("float32")  # a metric must not depend on the device it is measured on
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with scratch("model") as folder:
        stored = store.at(*train["model"].split("/"))
        for name in (WEIGHTS, MODEL):
            (folder / name).write_bytes(stored.get(name))
        model, _, card = load_model(folder, device=str(device), digest=train["digest"])
    task, own = card["task"], list(card["classes"])
    if (task == "multilabel") != (data.manifest.task == "multilabel"):
        raise UsageError(f"--on {work.on}: its task is {data.manifest.task}, but the model's is {task}")
    given = read_class_map(Path(work.class_map)) if work.class_map else {}
    resolved = resolve_classes(given, data.manifest.classes, own)
    with Loader(data) as loader:
        part = infer(
            model,
            loader,
            work.split,
            micro_batch=work.values.evaluate.micro_batch,
            image_size=card["image_size"],
            device=device,
        )
    index = data.index(work.split)
    _, logits = join([part], len(index), work.split)
    found = without_unlabeled(
        StoredPredictions(
            key=index.key,
            group=index.group,
            labels=map_labels(index.labels, resolved, own),
            scores=scores(torch.from_numpy(logits), task).numpy().astype(np.float32),
            logits=logits,
            task=task,
            classes=tuple(own),
            split=work.split,
            manifest=data.digest,
            model=train["digest"],
            metadata={name: getattr(index, name) for name in ("height", "width", "channels")},
        )
    )
    if not len(found):
        raise UsageError(f"--on {work.on}: no image of split {work.split} is of a class of the model")
    return found
