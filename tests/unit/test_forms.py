"""The files of the repository that other programs read: schemas of GitHub's and of a citation, and their commands."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yaml"))


def parsed(path: Path) -> dict:
    return yaml.load(path.read_text(), yaml.BaseLoader)


def check(schema: str, *paths: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_has_the_form_that_github_reads():
    check("vendor.citation-file-format", ROOT / "CITATION.cff")


def test_the_citation_names_the_projects_version_and_license():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = parsed(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_the_workflows_have_the_form_that_github_reads():
    assert WORKFLOWS
    check("vendor.github-workflows", *WORKFLOWS)


def test_the_templates_of_issues_have_the_form_that_github_reads():
    config = GITHUB / "ISSUE_TEMPLATE" / "config.yaml"
    check("vendor.github-issue-config", config)
    check("vendor.github-issue-forms", *(path for path in config.parent.glob("*.yaml") if path != config))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_workflows_call_make_targets_and_tests_that_exist(path):
    makefile = (ROOT / "Makefile").read_text()
    commands = [step["run"] for job in parsed(path)["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        for line in command.splitlines():
            words = line.split()
            if words[0] == "make":
                assert f"\n{words[1]}:" in makefile, line
            for word in words:
                if word.startswith("tests/"):
                    assert (ROOT / word).exists(), line


def test_workflows_use_the_python_versions_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (least,) = (each for each in [project["requires-python"].removeprefix(">=")])
    versions = [
        version
        for path in WORKFLOWS
        for job in parsed(path)["jobs"].values()
        for version in job.get("strategy", {}).get("matrix", {}).get("python", [])
    ]
    assert versions[0] == least
    classifiers = {text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text}
    assert set(versions) == classifiers


@pytest.mark.parametrize("package", ["data_shards", "medmamba", "pipelines"])
def test_the_types_of_each_package_are_shipped(package):
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]


def test_pre_commit_reads_its_configuration_with_pinned_ruff():
    config = parsed(ROOT / ".pre-commit-config.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    revisions = {repo["repo"].rpartition("/")[2]: repo.get("rev", "") for repo in config["repos"]}
    assert revisions["ruff-pre-commit"] == f"v{pins['ruff']}"
    assert revisions["codespell"] == f"v{pins['codespell']}"
