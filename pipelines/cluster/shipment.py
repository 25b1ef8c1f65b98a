"""What `medmamba submit` sends to a cluster: the packages, addresses of services, the commit. No secrets.

The Jobs API shows a job's command and variables to everyone with access, so credentials are not sent: the cluster's
nodes have their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipelines.provenance import COMMIT_VARIABLE, PACKAGES, git_commit
from pipelines.scratch import scratch

# Addresses of services, never credentials.
PASSED_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "MEDMAMBA_STORE",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
)
_USER_IN_URL = re.compile(r"://[^/?#\s]*@")
_SECRET_IN_QUERY = re.compile(
    r"://.*[?&][^=&#\s]*(passw|secret|token|signature|credential|api_?key|access_?key)[^=&#\s]*=", re.IGNORECASE
)


class ClusterError(ValueError):
    """The cluster, or what would be sent to it, is not valid."""


def check_command(command: Sequence[str]) -> None:
    """Raises ClusterError if a command is empty, would reveal a secret, or names a store that would be lost."""
    if not command:
        raise ClusterError("no command given; use medmamba submit --address URL -- COMMAND")
    refuse_secrets({f"argument {number}": value for number, value in enumerate(command, start=1)})
    _refuse_lost_store("--store", _option(command, "--store"))


def job_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables to add to the job's environment: the allowed ones of `environ`, and the commit.

    Raises ClusterError if a value would reveal a secret, or if the store would be in the job's temporary folder.
    """
    passed = {name: environ[name] for name in PASSED_VARIABLES if environ.get(name)}
    refuse_secrets(passed)
    _refuse_lost_store("MEDMAMBA_STORE", passed.get("MEDMAMBA_STORE", ""))
    # Ray rejects a driver whose runtime environment repeats a variable of the job's, even with the same value; with
    # this one the driver's takes precedence.
    return {**passed, COMMIT_VARIABLE: git_commit(), "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"}


@contextlib.contextmanager
def staged_packages() -> Iterator[Path]:
    """A temporary folder with a copy of the three packages: code and data files; no caches and no bench/peers."""
    with scratch("submit") as folder:
        for name in PACKAGES:
            spec = importlib.util.find_spec(name)
            assert spec is not None, f"package {name} is not installed"
            assert spec.origin is not None, f"package {name} has no __init__"
            # pipelines/bench/peers imports projects that a cluster does not have.
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.nbi", "*.nbc", ".*", "tests", "peers")
            shutil.copytree(Path(spec.origin).parent, folder / name, ignore=ignored)
        yield folder


def refuse_secrets(values: Mapping[str, str]) -> None:
    """Raises ClusterError, without repeating the value, if a URL among the values contains credentials."""
    for name, value in values.items():
        if _USER_IN_URL.search(value) or _SECRET_IN_QUERY.search(value):
            raise ClusterError(
                f"{name} is a URL with a user, password or token, which the Jobs API would show to everyone; "
                f"remove it from the URL and give the credentials to the cluster's nodes (infra/README.md)"
            )


def _refuse_lost_store(name: str, store: str) -> None:
    """Raises ClusterError if the store would be in the job's working folder, which Ray deletes."""
    if store and "://" not in store and not os.path.isabs(store):
        raise ClusterError(
            f"{name} {store}: a relative path would be in the job's working folder, which Ray deletes; "
            f"give s3://BUCKET/PREFIX, or an absolute path that every node shares"
        )


def _option(command: Sequence[str], name: str) -> str:
    """The value of an option in a command, given as --name VALUE or --name=VALUE; empty if it is missing."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""
