"""What made a result: the git commit of the code that ran, and the versions of the libraries under it."""

from __future__ import annotations

import os
import platform
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

PACKAGES = ("pipelines", "medmamba", "data_shards")
COMMIT_VARIABLE = "MEDMAMBA_GIT_COMMIT"
LIBRARIES = (
    "medmamba",
    "torch",
    "numpy",
    "numba",
    "ray",
    "deepspeed",
    "mlflow",
    "optuna",
    "webdataset",
    "pyarrow",
    "boto3",
    "pillow",
    "safetensors",
    "scikit-learn",
    "pydantic",
    "mamba-ssm",
    "triton",
)


def git_commit() -> str:
    """The commit of the running code as 40 hex digits, with "-dirty" where its files differ from it.

    On a cluster the packages arrive without their history, so `MEDMAMBA_GIT_COMMIT`, which `medmamba submit` passes,
    counts first. "unknown" where there is neither (an installed wheel, no git).
    """
    passed = os.environ.get(COMMIT_VARIABLE, "").strip()
    if passed:
        return passed
    root = Path(__file__).resolve().parents[1]
    # A virtual environment inside some other repository must not lend its commit to the wheel installed there.
    if _git(root, "ls-files", "--error-unmatch", "pipelines/provenance.py") is None:
        return "unknown"
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *PACKAGES)
    if not commit or changes is None:
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def version() -> str:
    """The version of this project, as `pyproject.toml` has it; "unknown" where only the packages are there (a job)."""
    try:
        return metadata.version("medmamba")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        file = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return str(tomllib.loads(file.read_text())["project"]["version"]) if file.is_file() else "unknown"


def package_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that decide numbers or formats; one not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command, or None where there is no git, no repository, or nothing of that name in it."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
