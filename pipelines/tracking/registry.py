"""Models in MLflow's registry: package a checkpoint, create a version, move an alias, load a version."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import data_shards
import medmamba
from medmamba.config import MODEL, WEIGHTS
from pipelines.evaluation.files import CALIBRATION
from pipelines.scratch import scratch
from pipelines.tracking.errors import TrackingError
from pipelines.tracking.runs import Tracking

PACKAGED_AT = "2000-01-01 00:00:00.000000"  # constant, for reproducible packages; MLflow records the real time
ARTIFACT = "model"  # prefix of a packaged model's folder in its run's artifacts
DIGEST_TAG = "medmamba.digest"  # of weights.safetensors and model.json (`medmamba.checkpoint.model_digest`)
PACKAGE_TAG = "medmamba.package"  # of all files of the packaged model (`package_digest`)
# MLflow and Python add these to a packaged model that is loaded in place; they are never read here.
_ADDED = ("__pycache__", "registered_model_meta")
# Only what prediction needs: the serving environment has neither Ray nor DeepSpeed.
NEEDED = ("mlflow", "torch", "numpy", "numba", "pandas", "pillow", "pydantic", "safetensors", "simplejpeg")


class IntegrityError(ValueError):
    """The files of a registered version differ from those that were registered."""


class AliasMovedError(TrackingError):
    """Someone else moved the alias at the same time."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model and its tags."""

    model: str
    number: int
    tags: Mapping[str, str]
    run_id: str
    status: str = "READY"
    source: str = ""
    """The location of its files according to MLflow."""

    @property
    def folder(self) -> str:
        """The folder of its files in its run's artifacts."""
        return self.source.rstrip("/").rpartition("/")[2] or ARTIFACT

    @property
    def uri(self) -> str:
        """The URI for mlflow.pyfunc.load_model."""
        return f"models:/{self.model}/{self.number}"


def package(folder: Path, checkpoint: Path, classes: list[str]) -> None:
    """Packages a checkpoint (weights.safetensors, model.json) as an MLflow model in the new folder `folder`.

    A calibration.json in the checkpoint's folder is packaged too.

    Uses MLflow's models from code, so it contains no pickle. The code that reads the checkpoint is included, so the
    model loads without this project installed. Signature: `image` (encoded bytes) -> one probability per class. The
    same checkpoint and code give the same bytes, so that a model uploaded twice keeps its digest.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    from medmamba.checkpoint import model_digest

    digest = model_digest((checkpoint / WEIGHTS).read_bytes(), (checkpoint / MODEL).read_bytes())
    artifacts = {"weights": str(checkpoint / WEIGHTS), "card": str(checkpoint / MODEL)}
    # The device and the calibration may be overridden when loading; the model checks its files against the digests.
    settings: dict[str, Any] = {"device": "cpu", "digest": digest}
    if (calibration := checkpoint / CALIBRATION).is_file():
        artifacts["calibration"] = str(calibration)
        settings |= {"calibrated": True, "calibration": hashlib.sha256(calibration.read_bytes()).hexdigest()}
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.double, name) for name in classes]),
    )
    with warnings.catch_warnings():
        # MLflow asks for an input example and would run the model on it; the signature is sufficient.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).parents[1] / "pyfunc.py"),
            artifacts=artifacts,
            code_paths=[package.__path__[0] for package in (medmamba, data_shards)],
            signature=signature,
            model_config=settings,
            pip_requirements=requirements(),
        )
    # The time, a random id and the path of the folder would make every package of the same model different.
    described = Model.load(str(folder))
    for artifact in described.flavors["python_function"]["artifacts"].values():
        artifact["uri"] = artifact["path"]
    described.utc_time_created, described.model_uuid = PACKAGED_AT, digest[:32]
    described.save(str(folder / "MLmodel"))


def package_digest(folder: Path) -> str:
    """sha256 (hex) over path and content of every file of a packaged model, sorted by path."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    digest = hashlib.sha256()
    for name in sorted(name for name in files if not set(name.split("/")) & set(_ADDED)):
        with files[name].open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def requirements() -> list[str]:
    """The installed versions of the packages for prediction, without local suffixes (+cpu), which no index has."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in NEEDED]


def find_versions(tracking: Tracking, model: str, tags: Mapping[str, str]) -> list[Version]:
    """The versions of `model` that carry all of `tags`, oldest first."""
    return [v for v in versions(tracking, model) if all(v.tags.get(key) == value for key, value in tags.items())]


def versions(tracking: Tracking, model: str) -> list[Version]:
    """All versions of `model`, oldest first; empty if the model does not exist."""
    found: list[Version] = []
    token = None
    while True:
        with tracking.errors(f"cannot list the versions of {model}"):
            page = tracking.client.search_model_versions(f"name = '{model}'", max_results=200, page_token=token)
        found += [_version(entry) for entry in page]
        token = page.token
        if not token:
            return sorted(found, key=lambda version: version.number)


def upload(tracking: Tracking, packaged: Path, run_id: str) -> str:
    """Copies a packaged model to its run's artifacts; returns the folder there. Safe to repeat.

    Each package has its own folder, because MLflow would keep the files of an older package.
    """
    folder = f"{ARTIFACT}-{package_digest(packaged)[:12]}"
    with tracking.errors("cannot upload the model"), _patience():
        tracking.client.log_artifacts(run_id, str(packaged), folder)
    return folder


def create_version(tracking: Tracking, model: str, run_id: str, folder: str, tags: Mapping[str, str]) -> Version:
    """Creates a version, with its tags, from the packaged model in `folder` of the run's artifacts.

    One tag should hold the digest of the packaged files (`PACKAGE_TAG`), because write access to the artifacts does not
    include the tags.
    """
    with tracking.errors(f"cannot register a version of {model}"):
        source = f"{tracking.client.get_run(run_id).info.artifact_uri}/{folder}"
        return _version(tracking.client.create_model_version(model, source, run_id=run_id, tags=tags))


def delete_unused(tracking: Tracking, version: Version) -> bool:
    """Deletes a version unless an alias points to it; returns whether it was deleted."""
    with tracking.errors(f"cannot delete version {version.number} of {version.model}"):
        if tracking.client.get_model_version(version.model, str(version.number)).aliases:
            return False
        tracking.client.delete_model_version(version.model, str(version.number))
        return True


def lacks(tracking: Tracking, version: Version, packaged: Path, run_id: str) -> str:
    """Why `version` does not contain the model packaged in `packaged`; empty if it does.

    Its registration may have failed, or files may be missing, replaced or added. Because other code may have packaged
    it, its files are compared with its own digest tag, and only weights and card with those in `packaged`.
    """
    if version.status != "READY":
        return f"its status in MLflow is {version.status}"
    if version.run_id != run_id:
        return f"it belongs to another run ({version.run_id})"
    with scratch("registered") as folder, tracking.errors(f"cannot read the files of {version.uri}"), _patience():
        if not tracking.client.list_artifacts(run_id, version.folder):
            return "its files are missing"
        local = Path(tracking.client.download_artifacts(run_id, version.folder, str(folder)))
        for name in (WEIGHTS, MODEL):
            found, expected = local / "artifacts" / name, packaged / "artifacts" / name
            if not found.is_file():
                return f"its file {name} is missing"
            if found.read_bytes() != expected.read_bytes():
                return f"its file {name} differs"
        if PACKAGE_TAG in version.tags and package_digest(local) != version.tags[PACKAGE_TAG]:
            return "some of its files are missing, changed or added"
    return ""


def by_number(tracking: Tracking, model: str, number: int) -> Version | None:
    """Version `number` of `model`, or None if it does not exist."""
    from mlflow.exceptions import MlflowException

    with tracking.errors(f"cannot read version {number} of {model}"):
        try:
            return _version(tracking.client.get_model_version(model, str(number)))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def by_alias(tracking: Tracking, model: str, alias: str) -> Version | None:
    """The version that `alias` points to, or None if the model or the alias does not exist."""
    from mlflow.exceptions import MlflowException

    with tracking.errors(f"cannot read the alias {alias} of {model}"):
        try:
            return _version(tracking.client.get_model_version_by_alias(model, alias))
        except MlflowException as error:
            # MLflow 3.17 reports INVALID_PARAMETER_VALUE for a missing alias of an existing model.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def move_alias(tracking: Tracking, version: Version, alias: str) -> None:
    """Moves `alias` to `version` and reads it back. Raises AliasMovedError if it points elsewhere."""
    with tracking.errors(f"cannot move the alias {alias}"):
        tracking.client.set_registered_model_alias(version.model, alias, str(version.number))
    now = by_alias(tracking, version.model, alias)
    if now is None or now.number != version.number:
        raise AliasMovedError(
            f"the alias {alias} of {version.model} points to version {now.number if now else 'none'}, not to "
            f"{version.number}: someone else moved it at the same time; run the step again"
        )


def tag_version(tracking: Tracking, version: Version, tags: Mapping[str, str]) -> None:
    """Sets or replaces tags of a version."""
    with tracking.errors(f"cannot tag version {version.number} of {version.model}"):
        for key, value in tags.items():
            tracking.client.set_model_version_tag(version.model, str(version.number), key, value)


def models_with_alias(tracking: Tracking, alias: str) -> list[str]:
    """Names of the registered models that have this alias."""
    found: list[str] = []
    token = None
    while True:
        with tracking.errors("cannot list the registered models"):
            page = tracking.client.search_registered_models(page_token=token)
        found += [model.name for model in page if alias in model.aliases]
        token = page.token
        if not token:
            return sorted(found)


@contextlib.contextmanager
def loaded(tracking: Tracking, version: Version, *, device: str = "cpu", calibrated: bool = True) -> Iterator[Any]:
    """Loads the version as a `pyfunc.Classifier`; its files are in a temporary folder that lasts as long as the block.

    With `calibrated` its probabilities have the temperature that was fitted on validation, if the version has one;
    `is_calibrated` of the classifier says so.

    The files are checked against the digests in the version's tags, and the packaged code is not executed: the
    installed code reads weights and model.json. Raises IntegrityError if anything was replaced.
    """
    from medmamba.checkpoint import CheckpointError
    from pipelines.pyfunc import Classifier

    with fetched(tracking, version) as folder:
        classifier = Classifier()
        settings = {"device": device, "digest": version.tags[DIGEST_TAG]}
        artifacts = {"weights": str(folder / WEIGHTS)}
        # Of a version without PACKAGE_TAG only the weights and the card were checked.
        if calibrated and PACKAGE_TAG in version.tags and (file := folder / CALIBRATION).is_file():
            artifacts["calibration"] = str(file)
            settings["calibration"] = hashlib.sha256(file.read_bytes()).hexdigest()
        try:
            classifier.load_context(SimpleNamespace(artifacts=artifacts, model_config=settings))
        except CheckpointError as error:
            raise IntegrityError(f"{version.uri} cannot be loaded: {error}") from error
        yield classifier


@contextlib.contextmanager
def fetched(tracking: Tracking, version: Version) -> Iterator[Path]:
    """Downloads weights.safetensors and model.json of the version into a temporary folder for the block.

    All files are checked against PACKAGE_TAG; the caller has to check the two files against DIGEST_TAG. Raises
    IntegrityError if anything was replaced or the version has no digest.
    """
    import mlflow.artifacts

    with scratch("registered") as folder:
        with tracking.errors(f"cannot fetch {version.uri}"), _patience():
            source = tracking.client.get_model_version_download_uri(version.model, str(version.number))
            local = mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=tracking.uri)
        yield _checked_weights(version, Path(local))


def _checked_weights(version: Version, folder: Path) -> Path:
    """Checks a downloaded version against its tags; returns the folder of the two files."""
    if DIGEST_TAG not in version.tags:
        raise IntegrityError(
            f"{version.uri} has no tag {DIGEST_TAG}, so its weights cannot be checked: it was not registered by "
            "`medmamba register`; use another alias or model"
        )
    expected = version.tags.get(PACKAGE_TAG)  # older versions only have the other tag
    if expected is not None and (found := package_digest(folder)) != expected:
        raise IntegrityError(
            f"the files of {version.uri} have the digest {found[:12]}, but {expected[:12]} was registered (tag "
            f"{PACKAGE_TAG}): files were replaced, added, removed or damaged in the artifact store; restore them, or "
            "delete the version and register its run again"
        )
    return folder / "artifacts"


def _version(entry: Any) -> Version:
    return Version(
        entry.name, int(entry.version), dict(entry.tags), entry.run_id, entry.status or "READY", entry.source or ""
    )


@contextlib.contextmanager
def _patience(seconds: int = 120) -> Iterator[None]:
    """Raises MLflow's request timeout: for a large file, the server only answers once the object store has it."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(seconds, int(before or 0)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
