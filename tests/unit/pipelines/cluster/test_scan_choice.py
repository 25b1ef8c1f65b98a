"""The backend of the scan, found out by a process of its own."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from medmamba.ops.ss2d_scan import resolve_backend
from pipelines.cluster.scan_choice import ScanChoice


def test_the_choice_is_the_backend_that_runs_on_this_machine(tmp_path, monkeypatch):
    (tmp_path / "pipelines").mkdir()  # a folder of the user's, which is no package of ours
    monkeypatch.chdir(tmp_path)
    assert ScanChoice("auto", "cpu").result() == resolve_backend("auto", "cpu")
    assert ScanChoice("reference", "cpu").result() == "reference"


def test_a_backend_that_cannot_run_here_is_told_with_its_reason():
    with pytest.raises(ValueError, match="scan backend 'mamba_ssm' cannot run on cpu"):
        ScanChoice("mamba_ssm", "cpu").result()


def test_a_process_that_failed_has_chosen_nothing():
    choice = ScanChoice("auto", "cpu")
    choice._process.kill()
    assert choice.result() is None


def test_a_ctrl_c_leaves_no_traceback_of_it(capfd):
    choice = ScanChoice("auto", "cpu")
    status = Path(f"/proc/{choice._process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text()).group(1), 16) & 1 << signal.SIGINT - 1:
        pass  # until Python takes the signal for a KeyboardInterrupt
    choice._process.send_signal(signal.SIGINT)
    assert choice.result() is None
    assert capfd.readouterr().err == ""


def test_a_choice_is_told_before_anything_is_built_ahead():
    assert ScanChoice("reference", "cpu", [(96, 3, 16)], ["float32", "bfloat16"]).result() == "reference"
