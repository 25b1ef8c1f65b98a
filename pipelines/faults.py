"""Failures in one line: cause and remedy of errors that are not mistakes in the configuration."""

from __future__ import annotations

import contextlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from json import JSONDecodeError
from pathlib import Path

from pydantic import ValidationError

from data_shards.store.disk import full_disk, is_full, says_full, temporary_folder
from pipelines.group_faults import RESUME, GroupFault

ON_THE_TERMINAL = "run the same command to see why: messages that may contain file names appear only in the terminal"
# Ray reports a lost process or machine only in the text of its errors.
_NO_MEMORY = ("low on memory", "OutOfMemoryError: Task was killed", "killed by the memory monitor")
_NODE_LOST = ("node has crashed", "node is dead", "marked dead", "raylet", "NodeDiedError", "node failure")
_WORKER_LOST = ("connection error code", "died unexpectedly", "WorkerCrashedError", "worker process has died")
_GPU_FULL = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "NVRTC_ERROR_OUT_OF_MEM")
# From torch when it compiles for a CPU, and from Triton when it compiles kernel launchers for a GPU.
_NO_COMPILER = ("InvalidCxxCompiler", "Failed to find C compiler")
_NO_ROOM_TO_START = (
    "worker group startup timed out",
    "WorkerGroupStartupTimeoutError",
    "insufficient cluster resources",
)
_NO_START = ("timed out during startup", "failed to start", "Failed to start", "Timed out waiting for file")
_LONGEST = 300
OURS = ("pipelines", "data_shards", "medmamba")
_LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and its causes, through Python's chain and Ray's wrappers, each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += _wrapped(each)
        waiting += [one for one in (each.__cause__, each.__context__) if one is not None]


def fault_line(error: BaseException, *, step: str = "", places: Sequence[str | Path] = ()) -> str:
    """Returns one line: what happened and what to do. `places` are folders whose disk may be full."""
    mistake = users_mistake(error)
    if mistake is not None:
        return str(mistake)
    chain = list(causes(error))
    fault = next((each for each in chain if isinstance(each, GroupFault)), None)
    if fault is not None:
        return str(fault)
    text = "\n".join(f"{type(each).__name__}: {each}" for each in chain)
    if any(says_full(each) for each in chain):
        return f"{_disk_line(chain, places)}, then {RESUME}"
    if any(sign in text for sign in _GPU_FULL):
        return f"the GPU ran out of memory: {_less_memory(step)}"
    if any(sign in text for sign in _NO_MEMORY) or any(isinstance(each, MemoryError) for each in chain):
        return f"the machine ran out of memory and {_who(step)} was killed: {_more_memory(step)}"
    if any(sign in text for sign in _NO_COMPILER):
        return (
            "the training step cannot be compiled: no C++ compiler found; install g++, or use --placement.compile off"
        )
    if any(sign in text for sign in _NO_START):
        return (
            f"a Ray process did not start ({_first_line(error)}): the machine may be overloaded or out of memory; "
            f"stop other programs, then {RESUME}"
        )
    if any(sign in text for sign in _NO_ROOM_TO_START):
        return f"{_who(step)} found no free CPU or GPU in time: stop other work on this Ray, then {RESUME}"
    if any(sign in text for sign in (*_WORKER_LOST, *_NODE_LOST)):
        return _lost(text, step)
    return (
        f"unexpected {type(innermost(error)).__name__}: {_first_line(error)}; if it happens again, report it as a bug"
    )


def comes_again(error: BaseException) -> bool:
    """Whether a retry would fail in the same way: a user's mistake, or a full GPU or disk."""
    if users_mistake(error) is not None:
        return True
    chain = list(causes(error))
    text = "\n".join(f"{type(each).__name__}: {each}" for each in chain)
    return any(says_full(each) for each in chain) or any(sign in text for sign in (*_GPU_FULL, *_NO_COMPILER))


def lost_ray(server: str) -> str:
    """The message about an embedded Ray whose process `server` has ended."""
    if _oom_kills() > _OOM_KILLS_BEFORE:
        return f"the machine ran out of memory and the kernel killed Ray: stop other programs, then {RESUME}"
    return f"Ray on this machine ended while the command was running ({server} was killed or crashed): {RESUME}"


def kept_reason(error: BaseException, *, step: str, places: Sequence[str | Path] = ()) -> str:
    """`fault_line` without line breaks, for what others can read (the store, MLflow).

    Errors of the shard step may quote file names, which can contain names of patients. Of those, only the `public`
    text is stored, if there is one; of unexpected errors only the type.
    """
    mistake = users_mistake(error)
    if step == "shard" and mistake is not None:
        return str(getattr(mistake, "public", "")) or f"refused; {ON_THE_TERMINAL}"
    reason = " ".join(fault_line(error, step=step, places=places).split())
    if step == "shard" and reason.startswith("unexpected "):
        return f"unexpected {type(innermost(error)).__name__}; {ON_THE_TERMINAL}"
    return reason


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raises the user's mistake that a task or training worker raised, without Ray's wrapper around it."""
    try:
        yield
    except Exception as error:  # Ray's wrappers share no base class
        if not _wrapped(error):
            raise
        raise users_mistake(error) or error from None


def users_mistake(error: BaseException) -> ValueError | None:
    """The ValueError with which a step or one of its workers tells the user what to do; None for any other error."""
    waiting = [error]
    while waiting:
        each = waiting.pop(0)
        inside = _wrapped(each)
        # Ray's wrapper is also an instance of the class that it wraps. JSON and Unicode errors, and errors that
        # a library raised, tell the user nothing.
        is_internal = isinstance(each, (UnicodeError, JSONDecodeError)) or _is_of_a_library(each)
        if isinstance(each, ValueError) and not inside and not is_internal:
            return each
        waiting += inside
    return None


def _is_of_a_library(error: BaseException) -> bool:
    """Whether a library raised it, by its traceback; False for an error from another process, which has none."""
    trace = error.__traceback__
    if trace is None or isinstance(error, ValidationError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    name, file = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_frame.f_code.co_filename
    return name.partition(".")[0] not in OURS and any(place in file for place in _LIBRARIES)


def has_more(error: BaseException) -> bool:
    """Whether the log adds to the message: the error or its direct cause is not a user's mistake."""
    behind = error.__cause__
    if users_mistake(error) is None:
        return True
    return behind is not None and users_mistake(behind) is None and not isinstance(behind, OSError)


def _wrapped(error: BaseException) -> list[BaseException]:
    """The errors inside a Ray error: the cause of a task or trial, the failures of training workers."""
    failures = getattr(error, "worker_failures", None) or {}
    inside = [
        getattr(error, "cause", None),
        getattr(error, "_base_exc", None),
        getattr(error, "controller_failure", None),
        *failures.values(),
    ]
    return [each for each in inside if isinstance(each, BaseException)]


def _disk_line(chain: Sequence[BaseException], places: Sequence[str | Path]) -> str:
    """The message about the full disk; stored on the error, because there may be room again by the next call."""
    said = next(each for each in chain if says_full(each))
    return said.__dict__.setdefault("full_disk", _full_disk(places))


def _full_disk(places: Sequence[str | Path]) -> str:
    """The message about the first full place; if none is full any more, the free space of all."""
    there = [*places, temporary_folder(), Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")]
    full = next((place for place in there if is_full(place)), None)
    if full is not None:
        return full_disk(full, "the files of this command")
    return "a disk filled up (" + "; ".join(full_disk(place, "it").partition(";")[0] for place in there) + ")"


def _less_memory(step: str) -> str:
    if step == "evaluate":
        return "lower --evaluate.micro-batch, with another --run NAME"
    return "lower --train.micro-batch (or --train.image-size), with another --run NAME"


def _more_memory(step: str) -> str:
    fewer = "--placement.concurrent-trials" if step == "tune" else "--placement.workers"
    return f"stop other programs, or lower {fewer}, then {RESUME}"


def _who(step: str) -> str:
    return {"train": "a training worker", "tune": "a trial", "shard": "a shard task"}.get(step, "a Ray process")


def _lost(text: str, step: str) -> str:
    if any(sign in text for sign in _NODE_LOST) and not any(sign in text for sign in ("connection error code",)):
        return f"a node of this Ray was lost while the command was running: {RESUME}"
    if _oom_kills() > _OOM_KILLS_BEFORE:
        return f"the machine ran out of memory and the kernel killed {_who(step)}: {_more_memory(step)}"
    return f"{_who(step)} was killed or crashed (by a signal, for lack of memory, or in native code): {RESUME}"


def innermost(error: BaseException) -> BaseException:
    """The error inside all of Ray's wrappers."""
    while inside := _wrapped(error):
        error = inside[0]
    return error


def _first_line(error: BaseException) -> str:
    lines = str(innermost(error)).strip().splitlines() or ["no message"]
    return lines[0][:_LONGEST]


def _oom_kills() -> int:
    """How many processes this machine's kernel has killed for lack of memory; 0 if unknown."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


_OOM_KILLS_BEFORE = _oom_kills()
