"""The provenance of a result: the git commit of the code and the versions of its libraries."""

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
    """The commit of the running code as 40 hex digits, with "-dirty" appended if files have changed.

    `MEDMAMBA_GIT_COMMIT` takes precedence: `medmamba submit` sets it, because packages reach a cluster without their
    history. "unknown" without either (an installed wheel, no git).
    """
    passed = os.environ.get(COMMIT_VARIABLE, "").strip()
    if passed:
        return passed
    root = Path(__file__).resolve().parents[1]
    # A wheel in a virtual environment inside another repository must not report that repository's commit.
    if _git(root, "ls-files", "--error-unmatch", "pipelines/provenance.py") is None:
        return "unknown"
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *PACKAGES)
    if not commit or changes is None:
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def version() -> str:
    """The version in `pyproject.toml`; "unknown" where only the packages are present (a Ray job)."""
    try:
        return metadata.version("medmamba")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        file = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return str(tomllib.loads(file.read_text())["project"]["version"]) if file.is_file() else "unknown"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that affect numbers or formats."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails or git is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
