"""Where a result says it comes from."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import provenance


@pytest.fixture(autouse=True)
def no_passed_commit(monkeypatch):
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)


def repository(folder: Path, *, track: bool = True) -> Path:
    """A git repository with a copy of the module under pipelines/, committed or not."""
    (folder / "pipelines").mkdir(parents=True)
    shutil.copy(provenance.__file__, folder / "pipelines" / "provenance.py")
    for package in ("medmamba", "data_shards"):
        (folder / package).mkdir()
    (folder / "README.md").write_text("a readme\n")
    git(folder, "init", "-q")
    git(folder, "add", "." if track else "README.md")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "first")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


def commit_seen_in(folder: Path) -> str:
    code = "from pipelines.provenance import git_commit; print(git_commit())"
    return subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_clean_checkout_is_its_commit(tmp_path):
    folder = repository(tmp_path)
    assert commit_seen_in(folder) == git(folder, "rev-parse", "HEAD").strip()
    assert re.fullmatch("[0-9a-f]{40}", commit_seen_in(folder))


def test_a_changed_or_a_new_code_file_makes_it_dirty(tmp_path):
    folder = repository(tmp_path)
    (folder / "medmamba" / "new.py").write_text("x = 1\n")
    assert commit_seen_in(folder).endswith("-dirty")


def test_a_changed_readme_does_not(tmp_path):
    folder = repository(tmp_path)
    (folder / "README.md").write_text("another readme\n")
    assert not commit_seen_in(folder).endswith("-dirty")


def test_a_copy_unknown_to_git_takes_no_commit_from_around_it(tmp_path):
    assert commit_seen_in(repository(tmp_path, track=False)) == "unknown"


def test_the_commit_that_submit_passed_counts_first(monkeypatch):
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "0123abc-dirty")
    assert provenance.git_commit() == "0123abc-dirty"


def test_package_versions_name_only_what_is_installed():
    versions = provenance.package_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "ray", "deepspeed", "mlflow"} <= set(versions)
    assert all(versions.values())
