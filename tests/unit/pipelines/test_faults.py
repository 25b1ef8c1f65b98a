"""Errors that are nobody's mistake: one line with cause and remedy, whatever wraps them."""

import errno
import json
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from data_shards.quarantine import RefusedError
from data_shards.store import StoreFullError
from data_shards.store.disk import DiskFullError
from pipelines import faults
from pipelines.faults import RESUME, causes, fault_line, has_more, kept_reason, unwrapped, users_mistake

KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\nThe actor is dead because "
    "its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
    "connection error code 2. End of file."
)
NODE = "The actor is dead because its owner has died. Owner worker exit type: SYSTEM_ERROR: Owner's node has crashed."


class WrappedError(RuntimeError):
    """As Ray's: of no use itself, with what it wraps in an attribute."""

    def __init__(self, text: str, **inside) -> None:
        super().__init__(text)
        self.__dict__ |= inside


class WrappedValueError(ValueError):
    """RayTaskError(ValueError): of the class of its cause, and with the traceback as its text."""

    def __init__(self, cause: ValueError) -> None:
        super().__init__("ray::task()\n  File x.py\nValueError: ...")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "step", "parts"),
    [
        (WrappedError("lost", worker_failures={0: RuntimeError(KILLED)}), "train",
         ["a training worker was killed", RESUME]),
        (RuntimeError(KILLED), "tune", ["a trial was killed or crashed", RESUME]),
        (RuntimeError(NODE), "train", ["a node of this Ray", "was lost", RESUME]),
        (WrappedError("x", cause=RuntimeError("CUDA out of memory. Tried")), "train",
         ["GPU ran out", "--train.micro-batch"]),
        (RuntimeError("CUDA out of memory. Tried"), "evaluate", ["GPU ran out of memory", "--evaluate.micro-batch"]),
        (RuntimeError("Task was killed due to the node running low on memory."), "train",
         ["ran out of memory", RESUME]),
        (MemoryError(), "shard", ["ran out of memory"]),
        (WrappedError("x", cause=RuntimeError("InvalidCxxCompiler: No working C++ compiler found in")), "train",
         ["no C++ compiler", "--placement.compile off"]),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "train", ["--placement.compile off"]),
        (Exception("The current node timed out during startup. This"), "", ["a Ray process did not start"]),
        (RuntimeError("The worker group startup timed out after 60"), "train", ["found no free CPU or GPU", RESUME]),
        (ZeroDivisionError("ours"), "train", ["unexpected ZeroDivisionError: ours", "report it as a bug"]),
        (WrappedError("a\nb", cause=KeyError("ours")), "train", ["unexpected KeyError: 'ours'"]),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_a_fault_is_one_line_with_its_cause_and_what_to_do(error, step, parts):
    line = fault_line(error, step=step)
    assert "\n" not in line
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_a_full_disk_is_named_whoever_noticed_it(error, tmp_path):
    outer = WrappedError("wrapped", worker_failures={1: error})
    line = fault_line(outer, places=[tmp_path])
    assert str(tmp_path) in line
    assert tempfile.gettempdir() in line
    assert " free" in line
    assert RESUME in line
    assert "\n" not in line


def test_a_kill_by_the_kernels_out_of_memory_killer_is_said(monkeypatch):
    monkeypatch.setattr(faults, "_OOM_KILLS_BEFORE", -1)
    assert "the machine ran out of memory and the kernel killed a training worker" in fault_line(
        RuntimeError(KILLED), step="train"
    )
    assert "the machine ran out of memory and the kernel killed Ray" in faults.lost_ray("its raylet")


def test_a_users_mistake_is_found_inside_rays_wrapping():
    mistake = ValueError("a is 3, must be 2; set 2")
    wrapped = WrappedError("x", worker_failures={0: WrappedValueError(mistake)})
    assert users_mistake(wrapped) is mistake
    assert fault_line(wrapped) == str(mistake)


def test_a_value_error_behind_an_unexpected_one_is_not_the_users():
    error = KeyError("ours")
    error.__context__ = error.__cause__ = ValueError("handled")
    assert users_mistake(error) is None
    assert "KeyError" in fault_line(error)


@pytest.mark.parametrize("text", ["{", "[1,"])
def test_text_that_a_parser_refuses_is_not_a_users_mistake(text):
    with pytest.raises(ValueError) as raised:
        json.loads(text)
    assert users_mistake(raised.value) is None


def test_causes_end_where_errors_name_each_other():
    first, second = WrappedError("a"), WrappedError("b")
    first.cause, second.cause = second, first
    assert list(causes(first)) == [first, second]


NAMES = ["Doe, John.png", "Smith (Mary).png", "O'Brien Ann.png", "Anna Mueller", "1.2.840.113619.2.55.3", "ward 7/anna"]


@pytest.mark.parametrize("name", NAMES)
def test_public_text_of_a_refused_conversion_quotes_no_file(name):
    text = f"2 of 9 images cannot be decoded: {name} (cut); repair or remove them"
    reason = kept_reason(ValueError(text), step="shard")
    assert reason.startswith("refused; run the same command to see why")
    assert kept_reason(ValueError(text), step="train") == text  # no other step knows a file's name
    unforeseen = kept_reason(FileNotFoundError(2, "No such file or directory", name), step="shard")
    assert unforeseen.startswith("unexpected FileNotFoundError; run the same command")


def test_a_refusal_may_say_what_others_may_read():
    error = RefusedError("3 of 9 images cannot be decoded: Doe, John.png", public="3 of 9 images cannot be decoded")
    assert kept_reason(error, step="shard") == "3 of 9 images cannot be decoded"


def test_a_full_disks_record_names_the_disk_of_the_terminal(tmp_path, monkeypatch):
    full = tmp_path / "store"
    monkeypatch.setattr(faults, "is_full", lambda place: place == full)
    error = WrappedError("x", cause=OSError(errno.ENOSPC, "No space left on device"))
    kept = kept_reason(error, step="train", places=[full])
    assert str(full) in kept
    monkeypatch.setattr(faults, "is_full", lambda place: False)  # room was made meanwhile
    assert fault_line(error, step="train") == kept


def test_a_full_disk_is_no_secret_of_a_conversion():
    for kind in (DiskFullError, StoreFullError):
        assert kept_reason(kind("the disk of /x is full"), step="shard") == "the disk of /x is full"


def test_a_value_error_that_a_library_raised_is_unexpected():
    with pytest.raises(ValueError) as raised:
        np.zeros(2) + np.zeros(3)
    assert users_mistake(raised.value) is raised.value  # raised in native code: the last frame is this test's
    with pytest.raises(ValueError) as raised:
        np.stack([np.zeros(2), np.zeros(3)])
    assert users_mistake(raised.value) is None
    assert has_more(raised.value)


def test_no_ray_is_imported_to_explain_a_fault():
    code = "import sys, pipelines.faults; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "error",
    [
        WrappedValueError(ValueError("lower it")),
        WrappedError("the group failed", worker_failures={1: WrappedError("x", cause=ValueError("lower it"))}),
    ],
    ids=["task", "training worker"],
)
def test_what_a_worker_refused_is_raised_in_place_of_rays_error(error):
    with pytest.raises(ValueError, match=r"^lower it$") as told, unwrapped():
        raise error
    assert type(told.value) is ValueError
    assert told.value.__suppress_context__


@pytest.mark.parametrize(
    "error", [WrappedError("x", cause=KeyError("ours")), ZeroDivisionError("ours")], ids=["wrapped", "the driver's own"]
)
def test_what_nobody_can_mend_in_a_recipe_stays_the_error_it_is(error):
    with pytest.raises(type(error)) as told, unwrapped():
        raise error
    assert told.value is error
