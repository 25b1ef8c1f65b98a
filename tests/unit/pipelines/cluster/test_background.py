"""Work beside the main thread: its result, its error, and no process that it holds up."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from pipelines.cluster.background import in_background


def test_the_result_is_what_the_work_returns_in_another_thread():
    assert in_background(threading.get_ident).result() != threading.get_ident()


def test_an_error_of_the_work_is_raised_with_its_result():
    def fails() -> None:
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        in_background(fails).result()


def test_a_process_ends_although_the_work_goes_on():
    code = (
        "import time; from pipelines.cluster.background import in_background; "
        "in_background(lambda: time.sleep(100)); print('over')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "over\n")
