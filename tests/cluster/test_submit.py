"""`medmamba submit` against a real Ray that was started separately and demands a token."""

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ray_cluster

from pipelines.cluster.job import ClusterError, submit
from pipelines.provenance import COMMIT_VARIABLE, git_commit

TOKEN = "a-token-of-the-tests-only"
PYTHON = ("python", "-c")  # what runs on the cluster where a test needs its own few lines
SECRETS = {"AWS_ACCESS_KEY_ID": "AKIDTESTKEY", "AWS_SECRET_ACCESS_KEY": "s3cr3t-key", "AWS_SESSION_TOKEN": "s3ssion"}


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory):
    """The dashboard's address of a Ray head with ports and a folder of its own, ended by its process group."""
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with ray_cluster(env, log=tmp_path_factory.mktemp("ray") / "head.log") as head:
        _wait_for_jobs_api(head.dashboard)
        yield head.dashboard


@pytest.fixture
def token(monkeypatch):
    """The right token in this process's environment, as a user would set it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def _wait_for_jobs_api(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return jobs(address)
        except OSError:
            assert time.monotonic() < deadline, "the Jobs API did not come up"
            time.sleep(0.2)


def jobs(address: str) -> str:
    """What the Jobs API tells anybody with the token, as text."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def test_shipped_packages_run_without_keys_and_exit_code_returns(ray_head, capfd, monkeypatch, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:7070")
    monkeypatch.setenv("MEDMAMBA_STORE", "s3://bucket/prefix")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # another Ray of this user: neither used nor passed on
    line = (
        "import json, os, pipelines, pipelines.provenance as p; print('SEEN', json.dumps(dict(file=p.__file__,"
        " commit=p.git_commit(), env={k: v for k, v in os.environ.items() if k[:3] in ('AWS', 'MED', 'RAY')},"
        " files=sorted(os.listdir('.')))))"
    )
    assert submit(ray_head, [line], program=PYTHON) == 0
    out, err = capfd.readouterr()
    assert "ray job stop --address" in err
    seen = json.loads(out.partition("SEEN {")[2].splitlines()[0].join(["{", ""]))
    assert seen["files"] == ["data_shards", "medmamba", "pipelines"]
    assert "working_dir" in seen["file"]
    assert seen["env"]["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:7070"
    assert seen["env"]["MEDMAMBA_STORE"] == "s3://bucket/prefix"
    assert seen["env"]["RAY_ADDRESS"] != "127.0.0.1:1"
    assert seen["commit"] == seen["env"][COMMIT_VARIABLE] == git_commit()
    told = jobs(ray_head)
    assert "s3://bucket/prefix" in told
    for secret in (*SECRETS.values(), *SECRETS, TOKEN):
        assert secret not in told


def test_a_job_runs_on_its_ray_and_its_exit_code_returns(ray_head, token, capfd, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-test-1")  # named by the job and again by the driver: no conflict
    line = (
        "import os; from pipelines.cluster.ray_session import connect; connect(); import ray; "
        "look = lambda: (os.environ['RAY_ADDRESS'], os.environ['AWS_REGION'], __import__('medmamba').__file__); "
        "print('TASK', os.environ['RAY_ADDRESS'], *ray.get(ray.remote(look).remote())); raise SystemExit(3)"
    )
    assert submit(ray_head, [line], program=PYTHON) == 3
    driver_ray, task_ray, region, file = capfd.readouterr().out.rpartition("TASK ")[2].split()[:4]
    assert driver_ray == task_ray
    assert region == "eu-test-1"
    assert "working_dir" in file


def test_what_a_verb_says_and_its_exit_code_come_back(ray_head, token, capfd):
    assert submit(ray_head, ["datasets", "no-such-dataset"]) == 2
    out = capfd.readouterr().out
    assert "'no-such-dataset' is not in the catalog" in out
    assert "Traceback" not in out


def test_rays_own_command_submits_the_checkout_as_well(ray_head, token):
    root = Path(__file__).resolve().parents[2]
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", ray_head]
    command += ["--working-dir", str(root), "--", "python", "-m", "pipelines", "datasets"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "phantoms" in done.stdout


def test_without_waiting_the_job_id_is_printed_and_the_job_runs(ray_head, token, capsys):
    assert submit(ray_head, ["import time; time.sleep(1); raise SystemExit(5)"], wait=False, program=PYTHON) == 0
    out = capsys.readouterr().out
    job_id = out.split()[1]
    assert "ray job logs --follow" in out
    assert job_id in out.splitlines()[2]
    deadline = time.monotonic() + 60
    while (info := _info(ray_head, job_id))["status"] != "FAILED":
        assert time.monotonic() < deadline, info
        time.sleep(0.2)
    assert info["driver_exit_code"] == 5


def test_a_job_that_is_stopped_from_elsewhere_is_not_a_success(ray_head, token, capsys):
    stopper = threading.Thread(target=_stop_when_it_runs, args=(ray_head, "stop-me"), daemon=True)
    stopper.start()
    assert submit(ray_head, ["'stop-me'; import time; time.sleep(120)"], program=PYTHON) == 1
    stopper.join(timeout=10)
    assert " stopped: " in capsys.readouterr().err


def test_ctrl_c_ends_the_watching_and_leaves_the_job_running(ray_head, token):
    line = "print('it runs', flush=True); import time; time.sleep(120)"
    code = (
        "from pipelines.cluster.job import submit\n"
        f"raise SystemExit(submit({ray_head!r}, [{line!r}], program={PYTHON!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while process.stdout.readline() != "it runs\n":  # Ray's own notes come first
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "continues to run" in err
    job_id = err.split()[1]
    assert f"ray job stop --address {ray_head} {job_id}" in err
    assert _info(ray_head, job_id)["status"] == "RUNNING"
    _post(ray_head, f"/api/jobs/{job_id}/stop")


def test_a_wrong_token_is_refused_in_one_line(ray_head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ClusterError, match=r"access denied \(403\).*RAY_AUTH_TOKEN") as caught:
        submit(ray_head, ["datasets"])
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_a_missing_token_is_refused_in_one_line(ray_head, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.ray/auth_token
    with pytest.raises(ClusterError, match=r"access denied \(401\).*none was found.*RAY_AUTH_TOKEN"):
        submit(ray_head, ["datasets"])


def _info(address: str, job_id: str) -> dict:
    return next(job for job in json.loads(jobs(address)) if job["submission_id"] == job_id)


def _post(address: str, path: str) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    urllib.request.urlopen(urllib.request.Request(address + path, headers=headers, method="POST"), timeout=20)


def _stop_when_it_runs(address: str, mark: str) -> None:
    for _ in range(300):
        for job in json.loads(jobs(address)):
            if mark in job["entrypoint"] and job["status"] == "RUNNING":
                return _post(address, f"/api/jobs/{job['submission_id']}/stop")
        time.sleep(0.2)
