"""Processes that tests start import the packages, not the folders of tests/unit that bear their names."""

import concurrent.futures
import importlib
import multiprocessing
import os
import subprocess
import sys

import pytest


def file_of(package: str) -> str | None:
    return importlib.import_module(package).__file__


@pytest.mark.parametrize("package", ["data_shards", "medmamba", "pipelines"])
def test_a_started_process_imports_the_package(package):
    expected = file_of(package)
    assert expected
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert pool.submit(file_of, package).result() == expected
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = f"import {package}; print({package}.__file__)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == expected
