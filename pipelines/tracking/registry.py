"""Models in MLflow's registry: package a checkpoint, make a version once, move an alias, load what it points to."""

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

from pipelines.scratch import scratch
from pipelines.tracking.errors import TrackingError
from pipelines.tracking.runs import Tracking

PACKAGED_AT = "2000-01-01 00:00:00.000000"  # when a version was made is on record in MLflow
ARTIFACT = "model"  # how the folder of a packaged model begins, below its run's artifacts
DIGEST_TAG = "medmamba.digest"  # of weights.safetensors and model.json (`medmamba.checkpoint.model_digest`)
PACKAGE_TAG = "medmamba.package"  # of all files of the packaged model (`package_digest`)
# What MLflow and Python add beside a packaged model where it is loaded in place; none of it is ever read here.
_ADDED = ("__pycache__", "registered_model_meta")
# What predicting needs, and no more: the serving environment has neither Ray nor DeepSpeed.
NEEDED = ("mlflow", "torch", "numpy", "numba", "pandas", "pillow", "pydantic", "safetensors", "simplejpeg")


class IntegrityError(ValueError):
    """The files of a registered version are not those that were registered."""


class AliasMovedError(TrackingError):
    """The alias does not point to where it was just moved: somebody else has moved it at the same moment."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model, with the tags that say what it is."""

    model: str
    number: int
    tags: Mapping[str, str]
    run_id: str
    status: str = "READY"
    source: str = ""
    """Where its files are, as MLflow has it."""

    @property
    def folder(self) -> str:
        """The folder of its files below the artifacts of its run."""
        return self.source.rstrip("/").rpartition("/")[2] or ARTIFACT

    @property
    def uri(self) -> str:
        """What mlflow.pyfunc.load_model takes."""
        return f"models:/{self.model}/{self.number}"


def package(folder: Path, checkpoint: Path, classes: list[str]) -> None:
    """Writes the MLflow model of a checkpoint (weights.safetensors, model.json) to the new folder `folder`.

    Models from code: no pickle. The code that reads the checkpoint lies inside, so that the model loads where this
    project is not installed. Signature: `image` (encoded bytes) -> one probability per class. The same checkpoint gives
    the same bytes with the same code, so that a model which is uploaded twice keeps its digest.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    import data_shards
    import medmamba
    from medmamba.checkpoint import MODEL, WEIGHTS, model_digest

    digest = model_digest((checkpoint / WEIGHTS).read_bytes(), (checkpoint / MODEL).read_bytes())
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.double, name) for name in classes]),
    )
    with warnings.catch_warnings():
        # It would have an input example as well; the signature says it all, and an example would be run here.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).parents[1] / "pyfunc.py"),
            artifacts={"weights": str(checkpoint / WEIGHTS), "card": str(checkpoint / MODEL)},
            code_paths=[package.__path__[0] for package in (medmamba, data_shards)],
            signature=signature,
            # The device may be overridden when loading; the digest is what the model holds its two files to.
            model_config={"device": "cpu", "digest": digest},
            pip_requirements=requirements(),
        )
    # The time, a random id and the folder it was made in would make every packaging of one model another package.
    described = Model.load(str(folder))
    for artifact in described.flavors["python_function"]["artifacts"].values():
        artifact["uri"] = artifact["path"]
    described.utc_time_created, described.model_uuid = PACKAGED_AT, digest[:32]
    described.save(str(folder / "MLmodel"))


def package_digest(folder: Path) -> str:
    """sha256 (hex) over path and content of every file of a packaged model, in the order of their paths."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    digest = hashlib.sha256()
    for name in sorted(name for name in files if not set(name.split("/")) & set(_ADDED)):
        with files[name].open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def requirements() -> list[str]:
    """The installed versions of what predicting needs; a local build's suffix (+cpu) is left out: no index has it."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in NEEDED]


def find_versions(tracking: Tracking, model: str, tags: Mapping[str, str]) -> list[Version]:
    """The versions of `model` that carry all of `tags`, oldest first."""
    return [v for v in versions(tracking, model) if all(v.tags.get(key) == value for key, value in tags.items())]


def versions(tracking: Tracking, model: str) -> list[Version]:
    """All versions of `model`, oldest first; none where there is no such model."""
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
    """Copies a packaged model to the artifacts of its run, the same files again; the folder there.

    A folder for each package: MLflow deletes nothing, and files of a package that other code made would stay.
    """
    folder = f"{ARTIFACT}-{package_digest(packaged)[:12]}"
    with tracking.errors("cannot upload the model"), _patience():
        tracking.client.log_artifacts(run_id, str(packaged), folder)
    return folder


def create_version(tracking: Tracking, model: str, run_id: str, folder: str, tags: Mapping[str, str]) -> Version:
    """Makes a version of the packaged model in a folder of the artifacts of its run; the tags come with it.

    One of them should hold the digest of the packaged files (`PACKAGE_TAG`): whoever can write to the artifacts cannot
    write there.
    """
    with tracking.errors(f"cannot register a version of {model}"):
        source = f"{tracking.client.get_run(run_id).info.artifact_uri}/{folder}"
        return _version(tracking.client.create_model_version(model, source, run_id=run_id, tags=tags))


def delete_unused(tracking: Tracking, version: Version) -> bool:
    """Deletes a version that no alias points to; whether it did."""
    with tracking.errors(f"cannot delete version {version.number} of {version.model}"):
        if tracking.client.get_model_version(version.model, str(version.number)).aliases:
            return False
        tracking.client.delete_model_version(version.model, str(version.number))
        return True


def lacks(tracking: Tracking, version: Version, packaged: Path, run_id: str) -> str:
    """Why `version` cannot be taken for the model packaged in `packaged`; empty where it can.

    Its registration may have failed; files may be missing, replaced or added. It may have been packaged by other code:
    it is held to the digest of its own tag, and its weights and card to those in `packaged`.
    """
    from medmamba.checkpoint import MODEL, WEIGHTS

    if version.status != "READY":
        return f"MLflow calls it {version.status}"
    if version.run_id != run_id:
        return f"it belongs to another run ({version.run_id})"
    with scratch("registered") as folder, tracking.errors(f"cannot look at the files of {version.uri}"), _patience():
        if not tracking.client.list_artifacts(run_id, version.folder):
            return "its files are missing"
        local = Path(tracking.client.download_artifacts(run_id, version.folder, str(folder)))
        for name in (WEIGHTS, MODEL):
            found, expected = local / "artifacts" / name, packaged / "artifacts" / name
            if not found.is_file():
                return f"its file {name} is missing"
            if found.read_bytes() != expected.read_bytes():
                return f"its file {name} is another one"
        if PACKAGE_TAG in version.tags and package_digest(local) != version.tags[PACKAGE_TAG]:
            return "some of its files are missing, or others were added"
    return ""


def by_number(tracking: Tracking, model: str, number: int) -> Version | None:
    """Version `number` of `model`, or None where it does not exist."""
    from mlflow.exceptions import MlflowException

    with tracking.errors(f"cannot read version {number} of {model}"):
        try:
            return _version(tracking.client.get_model_version(model, str(number)))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def by_alias(tracking: Tracking, model: str, alias: str) -> Version | None:
    """The version that `alias` points to, or None where the model or the alias does not exist."""
    from mlflow.exceptions import MlflowException

    with tracking.errors(f"cannot read the alias {alias} of {model}"):
        try:
            return _version(tracking.client.get_model_version_by_alias(model, alias))
        except MlflowException as error:
            # MLflow 3.17 says INVALID_PARAMETER_VALUE for a missing alias of an existing model.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def move_alias(tracking: Tracking, version: Version, alias: str) -> None:
    """Points `alias` to `version`. MLflow has no compare-and-set: raises AliasMovedError where another won."""
    with tracking.errors(f"cannot move the alias {alias}"):
        tracking.client.set_registered_model_alias(version.model, alias, str(version.number))
    now = by_alias(tracking, version.model, alias)
    if now is None or now.number != version.number:
        raise AliasMovedError(
            f"the alias {alias} of {version.model} points to version {now.number if now else 'none'}, not to "
            f"{version.number}: somebody else promoted at this moment; run the step again"
        )


def tag_version(tracking: Tracking, version: Version, tags: Mapping[str, str]) -> None:
    """Sets or replaces tags of a version."""
    with tracking.errors(f"cannot tag version {version.number} of {version.model}"):
        for key, value in tags.items():
            tracking.client.set_model_version_tag(version.model, str(version.number), key, value)


def models_with_alias(tracking: Tracking, alias: str) -> list[str]:
    """Names of the registered models that have a version of this alias."""
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
def loaded(tracking: Tracking, version: Version, *, device: str = "cpu") -> Iterator[Any]:
    """The version as a `pyfunc.Classifier`, for the length of a block (its files are in a temporary folder).

    The files are compared with the digests in the version's tags first, and the code among them is not run: weights
    and model.json are read by the code that is installed here. Raises IntegrityError where anything was replaced.
    """
    from medmamba.checkpoint import WEIGHTS, CheckpointError
    from pipelines.pyfunc import Classifier

    with fetched(tracking, version) as folder:
        classifier = Classifier()
        settings = {"device": device, "digest": version.tags[DIGEST_TAG]}
        try:
            artifacts = {"weights": str(folder / WEIGHTS)}
            classifier.load_context(SimpleNamespace(artifacts=artifacts, model_config=settings))
        except CheckpointError as error:
            raise IntegrityError(f"{version.uri} cannot be used: {error}") from error
        yield classifier


@contextlib.contextmanager
def fetched(tracking: Tracking, version: Version) -> Iterator[Path]:
    """A temporary folder with weights.safetensors and model.json of the version, for the length of a block.

    All its files have the digest of PACKAGE_TAG; that the two have that of DIGEST_TAG is for the reader to check.
    Raises IntegrityError where anything was replaced, or the version has no digest.
    """
    import mlflow.artifacts

    with scratch("registered") as folder:
        with tracking.errors(f"cannot fetch {version.uri}"), _patience():
            source = tracking.client.get_model_version_download_uri(version.model, str(version.number))
            local = mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=tracking.uri)
        yield _checked_weights(version, Path(local))


def _checked_weights(version: Version, folder: Path) -> Path:
    """Where the two files of a downloaded version are, once all its files have the digest that its tags name."""
    if DIGEST_TAG not in version.tags:
        raise IntegrityError(
            f"{version.uri} has no tag {DIGEST_TAG}, so its weights cannot be checked: it was not registered by "
            "`medmamba register`; name another alias or model"
        )
    expected = version.tags.get(PACKAGE_TAG)  # versions from before there was one are held to the other tag alone
    if expected is not None and (found := package_digest(folder)) != expected:
        raise IntegrityError(
            f"the files of {version.uri} have the digest {found[:12]}, but {expected[:12]} was registered (tag "
            f"{PACKAGE_TAG}): some of them were replaced, added, removed or damaged in the artifact store, and none is "
            "used; restore them, or delete the version and register its run again"
        )
    return folder / "artifacts"


def _version(entry: Any) -> Version:
    return Version(
        entry.name, int(entry.version), dict(entry.tags), entry.run_id, entry.status or "READY", entry.source or ""
    )


@contextlib.contextmanager
def _patience(seconds: int = 120) -> Iterator[None]:
    """A server that is there may take long over a large file: it answers when the object store has all of it."""
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
