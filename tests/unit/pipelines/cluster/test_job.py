"""What `medmamba submit` refuses before it sends anything, and what it would send."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from pipelines.cluster import job
from pipelines.cluster.job import submit
from pipelines.cluster.shipment import PASSED_VARIABLES, ClusterError, job_variables, staged_packages
from pipelines.provenance import COMMIT_VARIABLE


@pytest.fixture
def nobody():
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    "address", ["head:8265", "ray://head:10001", "127.0.0.1:6379", "http://", "http://head:port", "http://[", ""]
)
def test_an_address_that_is_no_dashboard_is_refused(address):
    with pytest.raises(ClusterError, match="http://HOST:8265"):
        submit(address, ["datasets"], environ={})


def test_an_address_with_a_password_is_refused_unrepeated():
    with pytest.raises(ClusterError, match="--address is a URL with a user, password or token") as caught:
        submit("http://someone:hunter2@head:8265", ["datasets"], environ={})
    assert "hunter2" not in str(caught.value)


def test_an_unreachable_address_is_named_within_15_seconds(nobody):
    start = time.monotonic()
    with pytest.raises(ClusterError, match=f"{nobody}: cannot be reached.*8265") as caught:
        submit(nobody, ["datasets"], environ={})
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 15


def test_a_server_that_accepts_and_says_nothing_is_named_too(monkeypatch):
    assert job.CONNECT_TIMEOUT_S + job.READ_TIMEOUT_S < 15
    monkeypatch.setattr(job, "READ_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"{address}: no answer in time"):
            submit(address, ["datasets"], environ={})


def test_a_web_server_that_is_no_ray_is_named():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match=r"the service there \(status 501\) is not a Ray dashboard"):
            submit(f"http://127.0.0.1:{server.server_port}", ["datasets"], environ={})
        server.shutdown()


def test_no_command_is_an_error(nobody):
    with pytest.raises(ClusterError, match="no command"):
        submit(nobody, [], environ={})


def test_a_token_path_that_cannot_be_read_is_named(nobody, tmp_path):
    path = str(tmp_path / "missing")
    with pytest.raises(ClusterError, match=f"RAY_AUTH_TOKEN_PATH={path}: not readable"):
        submit(nobody, ["datasets"], environ={"RAY_AUTH_TOKEN_PATH": path})


def test_only_the_allow_list_and_the_commit_travel():
    environ = {
        "AWS_ENDPOINT_URL_S3": "http://s3:7070",
        "AWS_REGION": "eu-test-1",
        "MEDMAMBA_STORE": "s3://bucket/prefix",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MLFLOW_S3_ENDPOINT_URL": "",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SESSION_TOKEN": "session",
        "MLFLOW_TRACKING_PASSWORD": "password",
        "RAY_AUTH_TOKEN": "token",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "HOME": "/root",
    }
    passed = job_variables(environ)
    ours = {COMMIT_VARIABLE, "RAY_OVERRIDE_JOB_RUNTIME_ENV"}
    assert set(passed) == ours | {"AWS_ENDPOINT_URL_S3", "AWS_REGION", "MEDMAMBA_STORE", "MLFLOW_TRACKING_URI"}
    assert passed[COMMIT_VARIABLE]


def test_no_name_on_the_allow_list_is_that_of_a_secret():
    for name in PASSED_VARIABLES:
        assert not any(word in name for word in ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL", "PROFILE"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_TRACKING_URI", "http://someone:hunter2@mlflow:5000"),
        ("MLFLOW_TRACKING_URI", "postgresql://mlflow:hunter2@postgres/mlflow"),
        ("AWS_ENDPOINT_URL", "https://hunter2@s3.example.org"),
        ("AWS_ENDPOINT_URL_S3", "https://s3.example.org/?X-Amz-Signature=hunter2"),
        ("MEDMAMBA_STORE", "s3://key:hunter2@bucket/prefix"),
    ],
)
def test_a_url_with_a_secret_in_a_variable_is_refused_unrepeated(name, value):
    with pytest.raises(ClusterError, match=f"{name} is a URL with a user, password or token") as caught:
        job_variables({name: value})
    assert "hunter2" not in str(caught.value)


def test_an_argument_whose_url_carries_a_secret_is_refused(nobody):
    command = ["shard", "--data.source=https://someone:hunter2@example.org/set.npz"]
    with pytest.raises(ClusterError, match="argument 2 is a URL") as caught:
        submit(nobody, command, environ={})
    assert "hunter2" not in str(caught.value)


def test_plain_addresses_pass():
    environ = {"MLFLOW_TRACKING_URI": "sqlite:////shared/a@b/mlflow.db", "AWS_ENDPOINT_URL": "http://s3:7070/?list=2"}
    assert environ.items() <= job_variables(environ).items()


def test_a_store_in_the_jobs_throw_away_folder_is_refused():
    with pytest.raises(ClusterError, match=r"MEDMAMBA_STORE \./medmamba-store.*s3://BUCKET/PREFIX"):
        job_variables({"MEDMAMBA_STORE": "./medmamba-store"})


@pytest.mark.parametrize("words", [["--store", "here"], ["--store=here"]], ids=["two words", "one word"])
def test_a_store_named_in_the_command_is_held_to_the_same(nobody, words):
    with pytest.raises(ClusterError, match="--store here: a relative path"):
        submit(nobody, ["run", "release", *words], environ={})


def test_just_the_three_packages_are_shipped_without_caches():
    with staged_packages() as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["data_shards", "medmamba", "pipelines"]
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".py", ".toml", ".cpp", ".cu", ".md", ".typed", ".html", ".css"}
        assert not any("__pycache__" in path.parts for path in files)
        assert (folder / "pipelines" / "cluster" / "job.py").is_file()
        assert not (folder / "pipelines" / "bench" / "peers").exists()
        assert sum(path.stat().st_size for path in files) < 5 << 20  # Ray refuses more than 100 MiB
    assert not folder.exists()


def test_what_is_shipped_measures_this_project_and_names_missing():
    script = (
        "from pipelines.bench.data import bench_data; from pipelines.bench.loading import TimedLoader; "
        "from pipelines.bench.measure import Case, measure; import pipelines; print(pipelines.__file__); "
        "print(TimedLoader('webdataset', None).why_not); "
        "print(measure(Case('resnet50', 1, 64, 'float32', '', 'cpu', False), repeats=1).why_not)"
    )
    with staged_packages() as folder:
        env = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-c", script]
        told = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
        where, loader, network = told.splitlines()
        assert where.startswith(str(folder))
    assert loader == "cannot be imported: No module named 'pipelines.bench.peers'"
    assert network == "the networks of other projects are not shipped to a cluster"
