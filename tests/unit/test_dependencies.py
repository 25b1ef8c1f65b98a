"""What is imported directly is declared in pyproject.toml, and what is declared is pinned in constraints.txt."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipelines", "medmamba", "data_shards")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Imported only where a comparison with them is asked for and they are there; the bench says so where they are not.
PEERS = {"img2dataset", "litdata", "streaming"}
# The distributions of modules that need not be installed where the tests run.
KNOWN = {"mamba_ssm": "mamba-ssm", "timm": "timm", "simplejpeg": "simplejpeg", "pyspng": "pyspng"}
TYPES_ONLY = {"_typeshed"}  # exists for the type checker alone
# Distributions that only one kind of machine has.
ELSEWHERE = {"mamba-ssm", "triton", "timm"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", each).group()) for each in requirements} - {"medmamba"}


RUNTIME = required(PROJECT["dependencies"])
EXTRAS = {extra: required(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}


def imported(folder: Path) -> dict[str, set[str]]:
    """Top-level module, not of the standard library and not ours -> the files below the folder that import it."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(str(path.relative_to(ROOT)))
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {*PACKAGES, "tests"}
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | ours | TYPES_ONLY}


def undeclared(folder: Path, declared: set[str]) -> dict[str, set[str]]:
    distributions = packages_distributions()
    return {
        name: files
        for name, files in imported(folder).items()
        if name not in PEERS
        and not {normal(each) for each in distributions.get(name, [KNOWN.get(name, name)])} & declared
    }


def test_what_the_packages_import_is_declared():
    declared = RUNTIME.union(*(EXTRAS[extra] for extra in ("cuda", "dicom", "export", "compare")))
    for package in PACKAGES:
        assert undeclared(ROOT / package, declared) == {}


def test_what_the_tests_import_is_declared():
    assert undeclared(ROOT / "tests", RUNTIME.union(*EXTRAS.values())) == {}


def test_what_is_declared_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = {normal(line.partition("==")[0]) for line in lines}
    assert RUNTIME.union(*EXTRAS.values()) - pinned - ELSEWHERE == set()
    assert len(pinned) == len(lines)


def test_an_import_that_is_not_declared_is_found():
    assert "scipy" in undeclared(ROOT / "data_shards", RUNTIME - {"scipy"})
