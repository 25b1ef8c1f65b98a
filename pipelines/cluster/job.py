"""Runs a command of `medmamba` on a Ray cluster, as a job of its Jobs API.

The three packages are sent as they are on this machine, without the folder around them, so that
`python -m pipelines COMMAND...` on the cluster runs the same code.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipelines.cluster.shipment import ClusterError, check_command, job_variables, refuse_secrets, staged_packages
from pipelines.provenance import COMMIT_VARIABLE

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PROGRAM = ("python", "-m", "pipelines")
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 8  # together below 15 s, the limit for reporting a silent service
LOST_AFTER_S = 120  # how long the logs may be unreachable before following the job ends with an error


def submit(
    address: str,
    command: Sequence[str],
    *,
    wait: bool = True,
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Submits `program` with `command` to the Ray at `address`; returns the exit code.

    With `wait` prints the job's output while it runs and returns its exit code: 128 + n if signal n ended it, 1 if it
    never ran, 130 if the user stopped watching (the job continues). Without, prints how to follow and stop it, and
    returns 0. Of the variables in `environ` (default: this process's) only `PASSED_VARIABLES` are sent. The token is
    found as Ray finds it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; RAY_AUTH_MODE "disabled" sends none.

    Raises ClusterError within 15 s if the address is invalid or does not answer, or if the token is missing or wrong;
    and before anything is sent if a variable or an argument would reveal a secret.
    """
    environ = os.environ if environ is None else environ
    check_command(command)
    address = _checked_address(address)
    variables = job_variables(environ)
    headers = _auth_headers(environ)
    _check_answers(address, headers)
    with _quiet_ray():
        return _run(_client(address, headers), address, [*program, *command], variables, wait=wait)


def _run(
    client: JobSubmissionClient, address: str, entrypoint: list[str], variables: dict[str, str], *, wait: bool
) -> int:
    job_id = _job_id(entrypoint)
    with staged_packages() as folder:
        try:
            client.submit_job(
                entrypoint=shlex.join(entrypoint),
                submission_id=job_id,
                runtime_env={"working_dir": str(folder), "env_vars": variables},
                metadata={"git_commit": variables[COMMIT_VARIABLE]},
            )
        except (RuntimeError, OSError) as error:  # from Ray's client for any answer but "accepted"
            reason = str(error).splitlines()[0]
            raise ClusterError(f"{address} did not accept the job: {reason}; see the head's dashboard.log") from None
    how_to = (
        f"  follow: ray job logs --follow --address {address} {job_id}\n"
        f"  stop:   ray job stop --address {address} {job_id}"
    )
    print(f"job {job_id} submitted to {address}\n{how_to}", file=sys.stderr if wait else sys.stdout, flush=True)
    if not wait:
        return 0
    try:
        _follow(client, job_id)
        return _exit_code(client, job_id)
    except KeyboardInterrupt:
        print(f"\nno longer watching job {job_id}, which continues to run\n{how_to}", file=sys.stderr)
        return 130


def _checked_address(address: str) -> str:
    """Returns the address without a trailing slash; ClusterError unless it is http(s)://HOST[:PORT]."""
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ClusterError(
            f"--address {address}: not the address of a Ray dashboard; give http://HOST:8265 or https://HOST "
            f"(not the address that workers join, and not ray://)"
        )
    refuse_secrets({"--address": address})
    return address.rstrip("/")


def _auth_headers(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the header with the token; empty if there is no token or authentication is disabled."""
    if environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return {}
    token = environ.get("RAY_AUTH_TOKEN", "").strip()
    path = environ.get("RAY_AUTH_TOKEN_PATH", "")
    if not token:
        file = Path(path) if path else Path.home() / ".ray" / "auth_token"
        try:
            token = file.read_text().strip()
        except OSError as error:
            if path:  # Ray itself aborts the process here
                raise ClusterError(
                    f"RAY_AUTH_TOKEN_PATH={path}: not readable ({error.strerror}); give a file with the cluster's token"
                ) from None
    if token and not (token.isascii() and token.isprintable()):
        raise ClusterError("the token of RAY_AUTH_TOKEN or its file is not one line of plain text; copy it again")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _check_answers(address: str, headers: dict[str, str]) -> None:
    """Raises ClusterError unless a Ray answers at the address and accepts the token. (Ray's client never times out.)"""
    import requests

    try:
        answer = requests.get(f"{address}/api/version", headers=headers, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    except requests.RequestException as error:
        reason = "no answer in time" if isinstance(error, requests.Timeout) else "cannot be reached"
        raise ClusterError(
            f"--address {address}: {reason}; a Ray dashboard must answer there: check that the head is up, the port is "
            f"right (8265 by default), and the tunnel or port-forward is open"
        ) from None
    if answer.status_code in (401, 403):
        problem = "the token is not that of the cluster" if headers else "a token is required and none was found"
        raise ClusterError(
            f"--address {address}: access denied ({answer.status_code}), {problem}; set RAY_AUTH_TOKEN to "
            f"the token that the cluster was started with, or RAY_AUTH_TOKEN_PATH to a file with it"
        )
    if answer.status_code != 200 or "ray_version" not in answer.text:
        raise ClusterError(
            f"--address {address}: the service there (status {answer.status_code}) is not a Ray dashboard; "
            f"give the dashboard's address, http://HOST:8265 by default"
        )


def _client(address: str, headers: dict[str, str]) -> JobSubmissionClient:
    """A client of the Jobs API at this address; hides RAY_ADDRESS, which would override the argument."""
    from ray.job_submission import JobSubmissionClient

    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return JobSubmissionClient(address, headers=dict(headers))
    finally:
        os.environ.update(hidden)


def _follow(client: JobSubmissionClient, job_id: str) -> None:
    """Prints the job's output until it ends, across broken connections (Ray repeats the output from the start)."""
    printed = 0
    lost_since: float | None = None
    while True:
        seen = 0
        try:
            for text in _tail(client, job_id):
                lost_since = None
                fresh = text[max(0, printed - seen) :]
                seen += len(text)
                printed += len(fresh)
                print(fresh, end="", flush=True)
            if client.get_job_status(job_id).is_terminal():
                return
        except Exception as error:  # any error: a proxy, the network or a restarting head; the job may be fine
            if lost_since is None:
                lost_since = time.monotonic()
                print(f"job {job_id}: connection lost ({type(error).__name__}), retrying", file=sys.stderr)
            if time.monotonic() - lost_since > LOST_AFTER_S:
                raise ClusterError(
                    f"job {job_id}: unreachable for {LOST_AFTER_S} s ({type(error).__name__}: {error}); it may "
                    f"still be running: check with `ray job status {job_id}` when the cluster answers again"
                ) from None
        time.sleep(1)


def _tail(client: JobSubmissionClient, job_id: str) -> Iterator[str]:
    """Yields the job's output in pieces until the job ends."""
    pieces = client.tail_job_logs(job_id)
    with asyncio.Runner() as runner:
        while (text := runner.run(_next(pieces))) is not None:
            yield text


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


def _exit_code(client: JobSubmissionClient, job_id: str) -> int:
    """The exit code of the ended job; prints why if it did not end by itself."""
    details = client.get_job_info(job_id)
    code = details.driver_exit_code
    if details.status.value == "SUCCEEDED":
        return 0
    if code is None or details.status.value == "STOPPED":
        print(f"job {job_id} {details.status.value.lower()}: {details.message or 'no reason given'}", file=sys.stderr)
    if not code:  # stopped or never started: it did not do its work, whatever its shell returned
        return 1
    return code if code > 0 else 128 - code


def _job_id(entrypoint: Sequence[str]) -> str:
    # A readable name for lists of jobs; the random part because Ray rejects a repeated id.
    verb = next((word for word in entrypoint[len(PROGRAM) :] if re.fullmatch("[a-z]+", word)), "job")
    return f"medmamba-{verb}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def _quiet_ray() -> Iterator[None]:
    """Keeps Ray's notes on uploading and on web sockets out of the job's own output."""
    import ray.job_submission  # noqa: F401  (sets the levels that are changed here)

    names = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
    loggers = [logging.getLogger(f"ray.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
