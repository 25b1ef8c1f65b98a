"""A signal to the whole process group ends Ray as well: the command still says that it was interrupted."""

import signal
import subprocess
import sys

import pytest

# The main thread is in native code for longer than anything here waits, so Python's own handler cannot run.
BUSY = """
import hashlib, os, signal, sys, threading, time
from pipelines import interrupt
from pipelines.commands.work import connect
from pipelines.console.terminal import Terminal
connect.ENDING_S = float(sys.argv[1])
ready = threading.Event()
def meanwhile():
    ready.wait()
    time.sleep(0.5)
    if sys.argv[2] != "none":
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    connect.end_without_ray(Terminal(), "its raylet")
with interrupt.interruptible():
    threading.Thread(target=meanwhile).start()
    ready.set()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
INTERRUPTED = "medmamba: interrupted; run the same command to resume"


def ended(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT"])
def test_a_command_whose_ray_got_the_same_signal_was_interrupted(sent):
    assert ended(BUSY, "0", sent) == (1, [INTERRUPTED])


def test_a_command_whose_ray_ended_without_a_signal_says_so():
    code, (line,) = ended(BUSY, "0", "none")
    assert code == 1
    assert "its raylet was killed or crashed" in line


def test_a_command_that_reported_its_end_adds_no_word():
    script = BUSY.replace("ready.set()", "ready.set(); interrupt.HAS_REPORTED.set(); print('told', file=sys.stderr)")
    assert ended(script, "50", "SIGTERM") == (1, ["told"])


def test_a_command_is_ended_although_nobody_reads_what_it_says():
    script = BUSY.replace("connect.end_without_ray", "sys.stderr.close(); connect.end_without_ray")
    assert ended(script, "0", "SIGTERM") == (1, [])


def test_a_signal_to_a_forked_process_is_none_to_this_one():
    script = (
        "import os, signal, time\n"
        "from pipelines.interrupt import interruptible, is_interrupted\n"
        "with interruptible():\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        signal.signal(signal.SIGTERM, lambda *_: os._exit(3))\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3\n"
        "    assert not is_interrupted(wait_s=0.2)\n"
    )
    assert ended(script) == (0, [])


def test_a_lost_lease_is_told_as_one_although_it_interrupts():
    script = (
        "import os, signal\n"
        "from data_shards.store.fenced_lease import LostLeaseError\n"
        "from pipelines.interrupt import interruptible, is_interrupted\n"
        "try:\n"
        "    with interruptible():\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        except KeyboardInterrupt:\n"
        "            raise LostLeaseError('gone') from None\n"
        "except LostLeaseError:\n"
        "    raise SystemExit(7 if is_interrupted() else 8)\n"
    )
    assert ended(script) == (7, [])


def test_a_terminated_blocks_exit_code_is_that_of_the_signal():
    script = (
        "import os, signal\n"
        "from pipelines.interrupt import interruptible\n"
        "with interruptible():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert ended(script) == (128 + signal.SIGTERM, [])
