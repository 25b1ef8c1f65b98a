"""What libraries print goes into a file; what the command says reaches the terminal, whoever redirects what."""

import logging
import os
import subprocess
import sys

import pytest

from pipelines.console.work_log import KEPT, _text, log_folder, own_messages, work_log

NOBODY = 2**22 + 1  # beyond the largest process id of Linux

NOISY = """
import os, sys, subprocess, logging, warnings
from pipelines.console.terminal import Terminal
from pipelines.console.work_log import own_messages, work_log
with work_log() as log:
    terminal = Terminal(log=log)
    terminal.say("ours")
    print("printed")
    print("to stderr", file=sys.stderr)
    os.write(1, b"native out\\n")
    os.write(2, b"native err\\n")
    subprocess.run(["sh", "-c", "echo from a child >&2"])
    warnings.warn("a warning")
    logging.getLogger("ray").error("ray says")
    with own_messages(terminal.say):
        logging.getLogger("data_shards.convert").warning("a notice of %s", "ours")
    terminal.trace("Traceback")
    print(log.named(), file=log.terminal, flush=True)
print("result")
print("after", file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_all_output_is_in_the_file_and_own_lines_on_the_terminal():
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True)
    assert done.stdout == "result\n", done.stderr
    (file,) = log_folder().iterdir()
    assert done.stderr.splitlines() == ["ours", "a notice of ours", "", f"details: {file}", "after"]
    kept = file.read_text()
    for said in ("printed", "to stderr", "native out", "native err", "from a child", "a warning", "ray says", "Trace"):
        assert said in kept
    assert file.stat().st_mode & 0o077 == 0


def test_an_empty_log_leaves_no_file():
    with work_log() as log:
        assert log.path is not None
    assert list(log_folder().iterdir()) == []


def test_of_earlier_commands_the_last_twenty_stay():
    log_folder().mkdir(parents=True)
    for number in range(30):
        (log_folder() / f"20260101-0000{number:02}-{NOBODY}.log").touch()
    with work_log() as log:
        log.write("x")
    kept = sorted(path.name for path in log_folder().iterdir())
    assert len(kept) == KEPT
    assert kept[0] == f"20260101-000011-{NOBODY}.log"
    assert kept[-1] == log.path.name


def test_without_a_cache_the_file_is_in_tmpdir(tmp_path, cache):
    cache.touch()
    folder = tmp_path / "tmp"
    folder.mkdir()
    env = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, env=env)
    (file,) = folder.glob("medmamba-logs-*/*.log")
    assert f"details: {file}" in done.stderr
    assert "native out" in file.read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_log_on_a_full_disk_fails_nothing():
    file = _text(os.open("/dev/full", os.O_WRONLY))
    print("x" * 100_000, file=file, flush=True)
    file.close()


def test_through_leaves_output_where_it_is(capfd):
    with work_log(through=True) as log:
        print("out")
        print("err", file=sys.stderr)
        log.write("kept")
    assert capfd.readouterr() == ("out\n", "err\n")
    assert log.path.read_text() == "kept\n"


def test_notices_reach_the_caller_for_the_block_only(capfd):
    said = []
    with own_messages(said.append):
        logging.getLogger("data_shards.x").warning("in %d", 1)
        logging.getLogger("other").warning("not ours")
    logging.getLogger("data_shards.x").warning("after")
    assert said == ["in 1"]


def test_a_file_in_which_there_is_nothing_is_not_named():
    with work_log() as log:
        assert log.named() == ""
        os.write(2, b"a library\n")
        assert log.named() == f"\ndetails: {log.path}"
