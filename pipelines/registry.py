"""Models in MLflow's registry: package a checkpoint, make a version once, move an alias, load what it points to."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.tracking import Tracking, TrackingError

ARTIFACT = "model"  # folder of the packaged model below its run's artifacts
# What predicting needs, and no more: the serving environment has neither Ray nor DeepSpeed.
NEEDED = ("mlflow", "torch", "numpy", "numba", "pandas", "pillow", "pydantic", "safetensors")


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

    @property
    def uri(self) -> str:
        """What mlflow.pyfunc.load_model takes."""
        return f"models:/{self.model}/{self.number}"


def package(folder: Path, checkpoint: Path, classes: list[str]) -> None:
    """Writes the MLflow model of a checkpoint (weights.safetensors, model.json) to the new folder `folder`.

    Models from code: no pickle. The code that reads the checkpoint lies inside, so that the model loads where this
    project is not installed. Signature: `image` (encoded bytes) -> one probability per class.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    import data_shards
    import medmamba
    from medmamba.checkpoint import MODEL, WEIGHTS

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.double, name) for name in classes]),
    )
    with warnings.catch_warnings():
        # It would have an input example as well; the signature says it all, and an example would be run here.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"weights": str(checkpoint / WEIGHTS), "card": str(checkpoint / MODEL)},
            code_paths=[package.__path__[0] for package in (medmamba, data_shards)],
            signature=signature,
            model_config={"device": "cpu"},  # what a person may override when loading
            pip_requirements=requirements(),
        )


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


def upload(tracking: Tracking, packaged: Path, run_id: str) -> None:
    """Copies a packaged model to the artifacts of its run; the same files are written again."""
    with tracking.errors("cannot upload the model"), _patience():
        tracking.client.log_artifacts(run_id, str(packaged), ARTIFACT)


def create_version(tracking: Tracking, model: str, run_id: str, tags: Mapping[str, str]) -> Version:
    """Makes a version of the packaged model in the artifacts of its run; the tags come with it."""
    with tracking.errors(f"cannot register a version of {model}"):
        source = f"{tracking.client.get_run(run_id).info.artifact_uri}/{ARTIFACT}"
        return _version(tracking.client.create_model_version(model, source, run_id=run_id, tags=dict(tags)))


def delete_unused(tracking: Tracking, version: Version) -> bool:
    """Deletes a version that no alias points to; whether it did."""
    with tracking.errors(f"cannot delete version {version.number} of {version.model}"):
        if tracking.client.get_model_version(version.model, str(version.number)).aliases:
            return False
        tracking.client.delete_model_version(version.model, str(version.number))
        return True


def lacks(tracking: Tracking, version: Version, packaged: Path, run_id: str) -> str:
    """Why `version` cannot be taken for the model packaged in `packaged`; empty where it can.

    Its registration may have failed, its files may be missing or other ones. Only names are compared, and the bytes of
    the weights and the card.
    """
    from medmamba.checkpoint import MODEL, WEIGHTS

    if version.status != "READY":
        return f"MLflow calls it {version.status}"
    if version.run_id != run_id:
        return f"it belongs to another run ({version.run_id})"
    with (
        tempfile.TemporaryDirectory(prefix="medmamba-registered-") as folder,
        tracking.errors(f"cannot look at the files of {version.uri}"),
        _patience(),
    ):
        named = set(_artifacts(tracking, run_id, ARTIFACT))
        for path in sorted(packaged.rglob("*")):
            if not path.is_file() or path.parent.name == "__pycache__":
                continue
            name = f"{ARTIFACT}/{path.relative_to(packaged).as_posix()}"
            if name not in named:
                return f"its file {name} is missing"
            if path.name in (WEIGHTS, MODEL):
                found = Path(tracking.client.download_artifacts(run_id, name, folder))
                if found.read_bytes() != path.read_bytes():
                    return f"its file {name} is another one"
    return ""


def _artifacts(tracking: Tracking, run_id: str, folder: str) -> Iterator[str]:
    for entry in tracking.client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from _artifacts(tracking, run_id, entry.path)
        else:
            yield entry.path


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
    """The version as MLflow's pyfunc model, for the length of a block (its files lie in a temporary folder)."""
    import mlflow.artifacts
    import mlflow.pyfunc

    # Already imported, the installed packages are used, whose kernels are compiled, not the copies in the model.
    import medmamba.checkpoint  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="medmamba-registered-") as folder:
        with tracking.errors(f"cannot fetch {version.uri}"), _patience():
            source = tracking.client.get_model_version_download_uri(version.model, str(version.number))
            local = mlflow.artifacts.download_artifacts(source, dst_path=folder, tracking_uri=tracking.uri)
        yield mlflow.pyfunc.load_model(local, model_config={"device": device})


def _version(entry: Any) -> Version:
    return Version(entry.name, int(entry.version), dict(entry.tags), entry.run_id, entry.status or "READY")


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
