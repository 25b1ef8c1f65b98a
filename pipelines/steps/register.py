"""Trained model -> a version in MLflow's registry, exactly one however often the step is interrupted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data_shards.store import Store
from medmamba.checkpoint import MODEL, WEIGHTS
from pipelines.flow import StepContext
from pipelines.placement import Placement
from pipelines.provenance import git_commit
from pipelines.registry import create_version, find_version, package
from pipelines.scratch import scratch


class RegisterConfig(BaseModel):
    """Under which name a model is registered (`recipe.registry`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = Field("", pattern=r"^[A-Za-z0-9_. -]*$", max_length=120)
    """Name of the registered model; every training of it is a version. Empty: medmamba-<dataset>."""


def run(
    config: RegisterConfig,
    placement: Placement,
    out: Store,
    context: StepContext,
    *,
    shard: dict,
    train: dict,
    evaluate: dict,
) -> dict:
    """Packages and registers the model; returns its name, version, digest and test metrics.

    A version that an interrupted run of this step left is found again by its tags. Raises ValueError where the
    model's files are not those that were trained and evaluated.
    """
    tracking = context.tracking
    name = config.model or f"medmamba-{shard['dataset']}"
    with tracking.running(out, run=context.run, step="register", params=config.model_dump()) as run_id:
        identity = {"medmamba.record": out.uri, "medmamba.digest": train["digest"]}
        version = find_version(tracking, name, identity)
        if version is None:
            with scratch("register") as folder:
                checkpoint = _fetch(context.store.at(train["model"]), folder / "checkpoint", train["digest"])
                card = json.loads((checkpoint / MODEL).read_text())["card"]
                packaged = folder / "packaged"
                package(packaged, checkpoint, card["classes"])
                tags = identity | _tags(context, shard, train, evaluate)
                version = create_version(tracking, name, packaged, run_id, tags)
        tracking.log_metrics(run_id, {f"test_{key}": value for key, value in evaluate["metrics"].items()})
    context.show.say(f"registered as version {version.number} of {name}")
    return {
        "digest": hashlib.sha256(f"{name}/{version.number}/{train['digest']}".encode()).hexdigest(),
        "model": name,
        "version": version.number,
        "uri": version.uri,
        "manifest": evaluate["manifest"],
        "metrics": evaluate["metrics"],
        "tracking_uri": tracking.address,
        "mlflow_run": run_id,
    }


def _fetch(model: Store, folder: Path, expected: str) -> Path:
    """Copies the model's files to `folder` and checks that they are the ones the training named."""
    folder.mkdir()
    digest = hashlib.sha256()
    for name in (WEIGHTS, MODEL):
        data = model.get(name)
        digest.update(data)
        (folder / name).write_bytes(data)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{model.uri} holds another model ({digest.hexdigest()[:12]}) than was trained and evaluated "
            f"({expected[:12]}): it was changed after the training; run the training again"
        )
    return folder


def _tags(context: StepContext, shard: dict, train: dict, evaluate: dict) -> dict[str, str]:
    """What the version says of itself: its origin, test metrics and baselines (a promotion reads them here)."""
    about = {
        "medmamba.run": context.run,
        "medmamba.dataset": shard["dataset"],
        "medmamba.manifest": evaluate["manifest"],
        "medmamba.git_commit": git_commit(),
        "medmamba.train_run": train.get("mlflow_run", ""),
        "medmamba.evaluate_run": evaluate.get("mlflow_run", ""),
    }
    for name, figures in evaluate.get("baselines", {}).items():
        about |= {f"baseline_{name}_{key}": repr(float(value)) for key, value in figures.items()}
    for name, reason in evaluate.get("absent_baselines", {}).items():
        about[f"baseline_{name}_absent"] = reason[:500]
    return about | {f"test_{key}": repr(float(value)) for key, value in evaluate["metrics"].items()}
