"""Compiled modules are kept in the user's cache where Python keeps them nowhere, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
import subprocess, sys
import pipelines.commands.bytecode as bytecode
bytecode.LARGEST = {largest!r}
bytecode.keep_bytecode()
import late
child = subprocess.run([sys.executable, "-c", "import early"], check=True)
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of two modules without bytecode."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("early", "late"):
        (folder / f"{name}.py").write_text("x = 1\n")
    return folder


def kept(folder: Path) -> set[str]:
    return {path.name.split(".")[0] for path in folder.rglob("*.pyc")}


def ask(packages: Path, largest: str, **variables: str) -> Path:
    cache = packages.parent / "cache"
    paths = os.pathsep.join([str(packages), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(cache), **variables}
    subprocess.run([sys.executable, "-c", ASK.format(largest=largest)], env=environment, check=True)
    return cache / "medmamba" / "bytecode"


def test_modules_are_kept_for_this_process_and_those_it_starts(packages):
    found = kept(ask(packages, "early", PYTHONDONTWRITEBYTECODE="1"))
    assert {"early", "late"} <= found
    assert not kept(packages)


def test_nothing_changes_where_packages_came_with_bytecode(packages):
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(packages / "early.py")], check=True)
    assert not kept(ask(packages, "early", PYTHONDONTWRITEBYTECODE="1"))
    assert kept(packages) == {"early"}


@pytest.mark.parametrize("named", [False, True])
def test_nothing_changes_if_python_or_a_named_folder_keeps_them(packages, named):
    own = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(packages.parent / "own")} if named else {}
    assert not kept(ask(packages, "early", **{"PYTHONDONTWRITEBYTECODE": "", **own}))
