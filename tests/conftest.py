"""Fixtures that start the real services the tests talk to: an S3 server, a Ray, an MLflow server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
# What would leak from the developer's shell into a test (and from one test's service into another's).
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MEDMAMBA_STORE", "AWS_PROFILE"):
    os.environ.pop(name, None)

# A warning is an error in the unit tests, but for these; a later entry counts more.
WARNINGS = (
    "error",
    "ignore:unclosed database",  # MLflow's SQLAlchemy, said since Python 3.13
    "ignore:The ``noload`` loader strategy is deprecated",  # MLflow's use of SQLAlchemy 2.1
    "ignore:.*Any type hint is inferred as AnyType",  # MLflow of a packaged model, whose input is a frame
    "ignore:Corrupt EXIF data",  # Pillow of damaged pictures
    "ignore:Truncated File Read",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # torch's compiler of what it looks at
    "ignore:Profiler won't be using warmup",  # torch of a profile that begins with the first step
    "ignore::DeprecationWarning:ray",  # Ray of itself
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turns warnings into errors in the unit tests."""
    unit = Path(__file__).parent / "unit"
    for item in items:
        if item.path.is_relative_to(unit):
            item.add_marker(pytest.mark.filterwarnings(*WARNINGS), append=False)


@pytest.fixture(scope="module", autouse=True)
def _same_import_path() -> Iterator[None]:
    """MLflow puts a loaded model's copy of the packages first, where processes of the next tests would find it."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real images and parity vectors; they are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED.name}/ with real images and parity vectors does not lie beside the project")
    return SHARED


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def service(command: list[str], *, url: str, env: dict[str, str] | None = None, log: Path, wait_s: float = 60):
    """Runs `command` in its own process group until the block ends; ready when `url` answers anything."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + wait_s
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{command[:3]} did not come up at {url}:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class RayHead:
    """A running Ray: `address` for drivers, `dashboard` for jobs."""

    address: str
    dashboard: str


@contextlib.contextmanager
def ray_cluster(env: dict[str, str], *, log: Path, resources: Sequence[str] = ("--num-cpus=2",)) -> Iterator[RayHead]:
    """A Ray head, by default of two CPUs, with ports and a folder of its own, ended by its process group."""
    folder = tempfile.mkdtemp(prefix="mm-ray-")  # short: Ray's sockets lie in it, and their paths may have 107 bytes
    port, dashboard = free_port(), free_port()
    ports = {"port": port, "dashboard-port": dashboard, "ray-client-server-port": free_port()}
    ports |= {"dashboard-agent-listen-port": free_port(), "metrics-export-port": free_port()}
    binaries = Path(sys.executable).parent
    command = [str(binaries / "ray"), "start", "--head", "--block", *resources]
    command += [f"--{name}={number}" for name, number in ports.items()]
    command += [f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    # A job's `python` is looked up on the head's PATH.
    env = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", **env}
    url = f"http://127.0.0.1:{dashboard}"
    try:
        with service(command, url=f"{url}/api/version", env=env, log=log) as process:
            deadline = time.monotonic() + 60
            while "Ray runtime started" not in log.read_text():  # the dashboard answers before a driver may come
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"Ray did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield RayHead(f"127.0.0.1:{port}", url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class S3Server:
    """A running S3 server: `env` holds what boto3, pyarrow and MLflow read, `uri` an existing bucket."""

    endpoint: str
    env: dict[str, str]
    uri: str


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[S3Server]:
    """moto over HTTP with real IAM checks: a wrong key is refused, the right one may do everything on S3."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("moto") / "moto.log"
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with service(command, url=endpoint, log=log):
        import boto3

        any_key = {"aws_access_key_id": "setup", "aws_secret_access_key": "setup", "region_name": "us-east-1"}
        iam = boto3.client("iam", endpoint_url=endpoint, **any_key)
        iam.create_user(UserName="tests")
        policy = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}'
        iam.put_user_policy(UserName="tests", PolicyName="s3", PolicyDocument=policy)
        boto3.client("s3", endpoint_url=endpoint, **any_key).create_bucket(Bucket="medmamba-tests")
        key = iam.create_access_key(UserName="tests")["AccessKey"]
        # From here on every call is authenticated: no further call is free.
        lock = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(lock)
        env = {
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        yield S3Server(endpoint, env, "s3://medmamba-tests")


@pytest.fixture(scope="session")
def radosgw_server(tmp_path_factory) -> Iterator[S3Server]:
    """A second real S3 server, where it is installed."""
    import radosgw

    if lacking := radosgw.missing():
        pytest.skip(f"{', '.join(lacking)} is not installed (Debian's radosgw, ceph-mon and ceph-osd)")
    with radosgw.radosgw(tmp_path_factory.mktemp("radosgw"), mon=free_port(), port=free_port()) as env:
        import boto3

        endpoint, keys = env["AWS_ENDPOINT_URL_S3"], {name.lower(): env[name] for name in env if "KEY" in name}
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(
            Bucket="medmamba-tests"
        )
        yield S3Server(endpoint, env, "s3://medmamba-tests")


@pytest.fixture(scope="session")
def open_server(tmp_path_factory) -> Iterator[str]:
    """Address of an S3 server with the bucket `open` that checks no signature, so that headers may be taken away."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", endpoint.rpartition(":")[2]]
    with service(command, url=endpoint, log=tmp_path_factory.mktemp("moto") / "moto.log"):
        import boto3

        any_key = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint, **any_key).create_bucket(Bucket="open")
        yield endpoint


@pytest.fixture
def s3(s3_server, monkeypatch, request) -> str:
    """A fresh prefix in the bucket, with the credentials in this process's environment."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return f"{s3_server.uri}/{abs(hash(request.node.nodeid))}"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory) -> Iterator[str]:
    """Address of an MLflow server with SQLite behind it that serves artifacts itself (clients need no credentials)."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    binaries = Path(sys.executable).parent
    command = [
        str(binaries / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts",
    ]  # fmt: skip
    # The server looks its own programs up on the PATH.
    env = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # its queue of background jobs doubles the time to start
    with service(command, url=f"{address}/health", env=env, log=folder / "server.log", wait_s=120):
        yield address
