"""Trained model -> a version in MLflow's registry, exactly one however often the step is interrupted."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_shards.store import Store
from data_shards.store.fenced_lease import FencedLease, LostLeaseError
from medmamba.config import MODEL, WEIGHTS
from pipelines.evaluation.files import CALIBRATION
from pipelines.placement import Placement
from pipelines.provenance import git_commit
from pipelines.scratch import scratch
from pipelines.steps.context import StepContext
from pipelines.tracking import make_once
from pipelines.tracking.leases import bind_model, model_lease
from pipelines.tracking.registry import (
    PACKAGE_TAG,
    Version,
    create_version,
    delete_unused,
    find_versions,
    lacks,
    package,
    package_digest,
    upload,
)

MAKE_S = 20.0  # the lease must last for longer than MLflow's client tries to make a version
TRIES = 5


class RegisterConfig(BaseModel):
    """The name under which a model is registered (`recipe.registry`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = Field("", pattern=r"^[A-Za-z0-9_. -]*$", max_length=120)
    """Name of the registered model; each training becomes a version of it. Empty: medmamba-<dataset>."""

    @field_validator("model")
    @classmethod
    def _names_something(cls, model: str) -> str:
        if model and not model.strip(". "):
            raise ValueError(f"model {model!r} has no letter or digit; give another name, or leave it empty")
        return model


def run(
    config: RegisterConfig,
    placement: Placement | None,
    out: Store,
    context: StepContext,
    *,
    shard: dict,
    train: dict,
    evaluate: dict,
) -> dict:
    """Packages and registers the model; returns its name, version, digest and test metrics.

    It holds the lease of the registered model, so that two registrations of one run make one version. A version that an
    interrupted run of this step left is found by its tags, which include the digest of the model.

    Raises:
        LeaseError: another process holds the model for longer than this one waits.
        OtherStoreError: the model belongs to another store.
        ValueError: the model's files are not the ones that were trained and evaluated.
    """
    tracking = context.tracking
    name = config.model or f"medmamba-{shard['dataset']}"
    identity = {"medmamba.record": out.uri, "medmamba.digest": train["digest"]}
    tags = identity | _tags(context, shard, train, evaluate)
    for left in reversed(range(TRIES)):
        with model_lease(context, name) as held:
            try:
                with tracking.running(
                    out, run=context.run, step="register", check=context.check, params=config.model_dump()
                ) as run_id:
                    held.note(mlflow_run=run_id)
                    # A repetition finds what was done before MLflow went down.
                    find = functools.partial(_version, context, out, name, held)
                    version = tracking.patiently(
                        functools.partial(find, train=train, evaluate=evaluate, run_id=run_id, tags=tags)
                    )
                    tracking.patiently(functools.partial(_drop_later, context, name, version, identity))
                    tested = {f"test_{key}": value for key, value in evaluate["metrics"].items()}
                    tracking.log_metrics(run_id, tested)
            except LostLeaseError as error:
                if not left:
                    raise
                context.show.say(f"{error}; looking again")
                continue
        break
    context.show.say(f"registered as version {version.number} of {name}")
    return {
        "digest": hashlib.sha256(f"{name}/{version.number}/{train['digest']}".encode()).hexdigest(),
        "model": name,
        "model_digest": train["digest"],
        "version": version.number,
        "uri": version.uri,
        "manifest": evaluate["manifest"],
        "metrics": evaluate["metrics"],
        "tracking_uri": tracking.address,
        "mlflow_run": run_id,
    }


def _version(
    context: StepContext,
    out: Store,
    name: str,
    held: FencedLease,
    *,
    train: dict,
    evaluate: dict,
    run_id: str,
    tags: dict[str, str],
) -> Version:
    """The version of this model: the one that an earlier run of this step made, else a new one."""
    tracking = context.tracking
    bind_model(tracking, name, context.store)
    identity = {key: tags[key] for key in ("medmamba.record", "medmamba.digest")}
    with scratch("register") as folder:
        checkpoint = _fetch(context.store.at(train["model"]), folder / "checkpoint", train["digest"])
        _fetch_calibration(context.store, evaluate, checkpoint, train["digest"])
        card = json.loads((checkpoint / MODEL).read_text())["card"]
        packaged = folder / "packaged"
        package(packaged, checkpoint, card["classes"])
        version = _found(context, name, packaged, run_id, identity)
        if version is not None:
            return version
        uploaded = upload(tracking, packaged, run_id)
        bind_model(tracking, name, context.store, create=True)
        held.check(for_s=MAKE_S)
        version = make_once(
            out,
            "version.asked",
            find=lambda: _found(context, name, packaged, run_id, identity),
            make=lambda: create_version(
                tracking, name, run_id, uploaded, {**tags, PACKAGE_TAG: package_digest(packaged)}
            ),
        )
        held.check()  # if this process was paused, another one may have made one too
        return version


def _drop_later(context: StepContext, name: str, version: Version, identity: dict[str, str]) -> None:
    """Deletes versions of the same model that a paused process made after `version`, if nothing points to them."""
    for later in find_versions(context.tracking, name, identity):
        if later.number > version.number and later.run_id == version.run_id and delete_unused(context.tracking, later):
            context.show.say(f"version {later.number} of {name} is a duplicate of version {version.number}: deleted")


def _found(context: StepContext, name: str, packaged: Path, run_id: str, identity: dict[str, str]) -> Version | None:
    """The intact version that an interrupted run of this step made, if any; reports versions that are not intact."""
    tracking = context.tracking
    for version in find_versions(tracking, name, identity):
        reason = lacks(tracking, version, packaged, run_id)
        if reason and version.tags.get(PACKAGE_TAG) == package_digest(packaged) and version.run_id == run_id:
            # Its files belong to this step's run, so they can be uploaded again.
            upload(tracking, packaged, run_id)
            context.show.say(f"version {version.number} of {name}: {reason}; its files were uploaded again")
            reason = lacks(tracking, version, packaged, run_id)
        if not reason:
            return version
        context.show.say(f"version {version.number} of {name} is not used: {reason}")
    return None


def _fetch(model: Store, folder: Path, expected: str) -> Path:
    """Copies the model's files to `folder`; raises ValueError if their digest is not `expected`."""
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


def _fetch_calibration(store: Store, evaluate: dict, folder: Path, model: str) -> None:
    """Copies calibration.json, if the evaluation has one; raises ValueError if it is damaged or another model's."""
    if not (key := evaluate.get("calibration")):  # evaluations of earlier releases have none
        return
    from pipelines.evaluation.calibrator import read_calibrator

    data = store.get(key)
    read_calibrator(data, model=model)
    (folder / CALIBRATION).write_bytes(data)


def _tags(context: StepContext, shard: dict, train: dict, evaluate: dict) -> dict[str, str]:
    """The version's tags: its origin, test metrics and baselines, which promotions read."""
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
