"""What lies where: the top level, and no trace of the machine a file was written on."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"pipelines", "medmamba", "infra", "data_shards", "tests"}
DOCUMENTS = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "CITATION.cff"}
ALLOWED = PACKAGES | DOCUMENTS | {"pyproject.toml", "Makefile", "constraints.txt"}
# Places of one machine: home folders, checkouts, temporary folders of a session, drives.
MACHINE_PATH = re.compile(r"(?<![\w$}.])(/(root|home|Users|work|mnt|opt/conda|workspace)/[\w.-]+|[A-Z]:\\\\?[A-Za-z])")
BINARY = {".npz", ".png", ".jpg", ".parquet", ".safetensors", ".tar", ".pth", ".pt"}
# Paths inside an image that the Dockerfile itself makes.
MADE_HERE = {"/home/ray"}


def tracked() -> list[Path]:
    """The files that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_level_holds_only_packages_and_tool_files():
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} <= ALLOWED


def test_nothing_that_is_made_is_tracked():
    for path in tracked():
        parts = set(path.relative_to(ROOT).parts)
        assert not parts & {"__pycache__", ".venv", "medmamba-store", "mlruns", "mlartifacts", ".carry"}
        assert path.suffix not in {".pyc", ".log", ".db", ".pth", ".nbi", ".nbc"}
        assert path.name != ".env"


def test_no_file_names_a_place_on_somebodys_machine():
    for path in tracked():
        if path.suffix in BINARY or path == Path(__file__).resolve():
            continue
        for match in MACHINE_PATH.finditer(path.read_text()):
            line = path.read_text()[: match.start()].count("\n") + 1
            assert match.group(0) in MADE_HERE, f"{path.relative_to(ROOT)}:{line}: {match.group(0)}"


def test_every_file_is_small_enough_to_be_read():
    for path in tracked():
        assert path.stat().st_size < 1 << 20, path.relative_to(ROOT)


@pytest.mark.parametrize("package", sorted(PACKAGES - {"infra", "tests"}))
def test_every_module_says_what_it_is(package):
    for path in (ROOT / package).rglob("*.py"):
        first = path.read_text().lstrip()
        assert not first or first.startswith('"""'), f"{path.relative_to(ROOT)} has no docstring"


def test_no_folder_is_called_by_a_word_that_says_nothing():
    words = {"utils", "util", "helpers", "common", "manager", "base", "core", "misc", "v2"}
    for path in tracked():
        names = {part.partition(".")[0] for part in path.relative_to(ROOT).parts}
        assert not names & words, path.relative_to(ROOT)
