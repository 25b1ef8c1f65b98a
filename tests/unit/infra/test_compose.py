"""infra/compose: one host's services."""

import json
import re
import subprocess
from importlib import resources

import pytest
import yaml
from deployment import INFRA, ROOT, SECRET_NAME, SECRET_VALUE, assert_image_is_pinned, pinned, strings

FOLDER = INFRA / "compose"
BY_REFERENCE = re.compile(r"\$\{([A-Z_]+):\?[^}]+\}")  # the start fails where it is not set


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def test_it_is_valid_by_the_compose_specification(compose):
    pytest.importorskip("check_jsonschema")
    import jsonschema

    vendored = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(compose, json.loads(vendored.read_text()))


def test_the_services_are_ray_mlflow_postgres_and_s3(compose):
    assert set(compose["services"]) == {"ray-head", "mlflow", "postgres", "s3", "bucket"}
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= set(compose["services"])


def test_every_image_is_pinned_and_none_is_minio(compose):
    for service in compose["services"].values():
        assert_image_is_pinned(service["image"])
        assert "minio" not in service["image"]


def test_our_image_is_built_from_this_repository(compose):
    for name in ("ray-head", "mlflow", "bucket"):
        build = compose["services"][name]["build"]
        context = (FOLDER / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).is_file()
        assert build["args"] == {"FLAVOUR": "cpu"}
    assert pinned("ray")  # the image installs by the constraints, so head and client agree


def test_secrets_come_from_the_env_file_and_must_be_there(compose):
    named = set()
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if SECRET_NAME.search(name):
                reference = BY_REFERENCE.fullmatch(value)
                assert reference, f"{name} holds a value"
                named.add(reference.group(1))
    for text in strings(compose):
        assert not SECRET_VALUE.search(text), text
    example = (FOLDER / "example.env").read_text()
    assert set(re.findall(r"^([A-Z_]+)=$", example, re.MULTILINE)) == named
    assert not re.search(r"^[A-Z_]+=.", example, re.MULTILINE)


def test_git_ignores_the_filled_in_environment_file():
    done = subprocess.run(["git", "check-ignore", "-q", "infra/compose/.env"], cwd=ROOT)
    assert done.returncode == 0


def test_every_port_is_bound_to_the_loopback(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_long_running_services_have_health_checks_to_wait_for(compose):
    services = compose["services"]
    for name in set(services) - {"bucket"}:
        assert services[name]["healthcheck"]["test"][0] == "CMD"
    assert services["mlflow"]["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert services["ray-head"]["depends_on"]["mlflow"] == {"condition": "service_healthy"}


@pytest.mark.filterwarnings("ignore")  # Ray's own, on import
def test_every_option_of_ray_and_mlflow_exists_as_pinned(compose):
    from mlflow.cli import server
    from ray.scripts.scripts import cli as ray

    services = compose["services"]
    commands = [
        (ray.commands["start"], ["ray", "start"], services["ray-head"]["command"]),
        (ray.commands["health-check"], ["ray", "health-check"], services["ray-head"]["healthcheck"]["test"][1:]),
        (server, ["mlflow", "server"], services["mlflow"]["command"]),
    ]
    for definition, words, command in commands:
        known = {option for parameter in definition.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert command[:2] == words
        used = {word.partition("=")[0] for word in command[2:]}
        assert used <= known, used - known


def test_the_head_demands_a_token_and_mlflow_answers_to_its_name(compose):
    head = compose["services"]["ray-head"]["environment"]
    assert head["RAY_AUTH_MODE"] == "token"
    host = head["MLFLOW_TRACKING_URI"].removeprefix("http://")
    allowed = next(word for word in compose["services"]["mlflow"]["command"] if word.startswith("--allowed-hosts="))
    assert host in allowed.partition("=")[2].split(",")


def test_the_scripts_in_it_compile(compose):
    compile(compose["services"]["bucket"]["command"][2], "bucket", "exec")
    compile(compose["services"]["mlflow"]["healthcheck"]["test"][3], "health", "exec")
