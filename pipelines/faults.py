"""What went wrong, in one line: cause and remedy of the errors that are nobody's mistake in the configuration."""

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

ON_THE_TERMINAL = "run the same command to see why: reasons that may name files are shown on the terminal only"
# What Ray says, only in its texts, of a process or a machine that was lost.
_NO_MEMORY = ("low on memory", "OutOfMemoryError: Task was killed", "killed by the memory monitor")
_NODE_LOST = ("node has crashed", "node is dead", "marked dead", "raylet", "NodeDiedError", "node failure")
_WORKER_LOST = ("connection error code", "died unexpectedly", "WorkerCrashedError", "worker process has died")
_GPU_FULL = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "NVRTC_ERROR_OUT_OF_MEM")
# What torch says where it compiles for a CPU, and Triton for the launchers of its kernels on a GPU.
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
    """The error and what is behind it, through Python's chain and Ray's wrapping, each once."""
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
    """One line: what happened and what to do. `places` are folders whose disk may be what is full."""
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
        return f"the machine ran out of memory, so {_who(step)} was ended: {_more_memory(step)}"
    if any(sign in text for sign in _NO_COMPILER):
        return (
            "the training step cannot be compiled: no C++ compiler found; install g++, or use --placement.compile off"
        )
    if any(sign in text for sign in _NO_START):
        return (
            f"a process of Ray did not start ({_first_line(error)}): the machine may be overloaded or out of memory; "
            f"end what else runs, then {RESUME}"
        )
    if any(sign in text for sign in _NO_ROOM_TO_START):
        return f"{_who(step)} found no free CPU or GPU in time: end what else uses this Ray, then {RESUME}"
    if any(sign in text for sign in (*_WORKER_LOST, *_NODE_LOST)):
        return _lost(text, step)
    return (
        f"unexpected {type(innermost(error)).__name__}: {_first_line(error)}; if it comes again, report it as a defect"
    )


def comes_again(error: BaseException) -> bool:
    """Whether the same work would end in the same way: a user's mistake, or a GPU or a disk that is full."""
    if users_mistake(error) is not None:
        return True
    chain = list(causes(error))
    text = "\n".join(f"{type(each).__name__}: {each}" for each in chain)
    return any(says_full(each) for each in chain) or any(sign in text for sign in (*_GPU_FULL, *_NO_COMPILER))


def lost_ray(server: str) -> str:
    """The line about an embedded Ray of which a server ended."""
    if _oom_kills() > _OOM_KILLS_BEFORE:
        return f"the kernel ran out of memory and killed Ray on this machine: end what else uses it, then {RESUME}"
    return f"Ray on this machine ended during the work ({server} was killed or crashed): {RESUME}"


def kept_reason(error: BaseException, *, step: str, places: Sequence[str | Path] = ()) -> str:
    """`fault_line` in one line, for what others may read (the store, MLflow).

    What stops a conversion may quote file names, which can name patients. So of such an error only its `public` text
    is kept, where it has one, and of an unforeseen one only its kind.
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
    """Raises what a task or a training worker raised as a user's mistake, in place of Ray's wrapping of it."""
    try:
        yield
    except Exception as error:
        if not _wrapped(error):
            raise
        raise users_mistake(error) or error from None


def users_mistake(error: BaseException) -> ValueError | None:
    """The ValueError that a step, or a worker of it, raised to say what to do; None where it is something else."""
    waiting = [error]
    while waiting:
        each = waiting.pop(0)
        inside = _wrapped(each)
        # Ray's wrapping is of the class of what it wraps as well. A JSON or Unicode error says nothing to a user, and
        # neither does one that a library raised.
        unsaid = isinstance(each, (UnicodeError, JSONDecodeError)) or _is_of_a_library(each)
        if isinstance(each, ValueError) and not inside and not unsaid:
            return each
        waiting += inside
    return None


def _is_of_a_library(error: BaseException) -> bool:
    """Whether it was raised in the code of a library, as far as its traceback says; that of another process is lost."""
    trace = error.__traceback__
    if trace is None or isinstance(error, ValidationError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    name, file = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_frame.f_code.co_filename
    return name.partition(".")[0] not in OURS and any(place in file for place in _LIBRARIES)


def has_more(error: BaseException) -> bool:
    """Whether the log has more than the line: the error, or what is right behind it, is not a user's mistake."""
    behind = error.__cause__
    if users_mistake(error) is None:
        return True
    return behind is not None and users_mistake(behind) is None and not isinstance(behind, OSError)


def _wrapped(error: BaseException) -> list[BaseException]:
    """What Ray has wrapped in this error: a task's or a trial's cause, the failures of training workers."""
    failures = getattr(error, "worker_failures", None) or {}
    inside = [
        getattr(error, "cause", None),
        getattr(error, "_base_exc", None),
        getattr(error, "controller_failure", None),
        *failures.values(),
    ]
    return [each for each in inside if isinstance(each, BaseException)]


def _disk_line(chain: Sequence[BaseException], places: Sequence[str | Path]) -> str:
    """The line about the disk that an error says is full, the same each time: there may be room again meanwhile."""
    said = next(each for each in chain if says_full(each))
    return said.__dict__.setdefault("full_disk", _full_disk(places))


def _full_disk(places: Sequence[str | Path]) -> str:
    """The line about the place that is full; where none is any more, about the one with the least room."""
    there = [*places, temporary_folder(), Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")]
    full = next((place for place in there if is_full(place)), None)
    if full is not None:
        return full_disk(full, "what had to be written")
    return "a disk became full (" + "; ".join(full_disk(place, "it").partition(";")[0] for place in there) + ")"


def _less_memory(step: str) -> str:
    if step == "evaluate":
        return "lower --evaluate.micro-batch, with another --run NAME"
    return "lower --train.micro-batch (or --train.image-size), with another --run NAME"


def _more_memory(step: str) -> str:
    fewer = "--placement.concurrent-trials" if step == "tune" else "--placement.workers"
    return f"end what else uses it, or lower {fewer}, then {RESUME}"


def _who(step: str) -> str:
    return {"train": "a training worker", "tune": "a trial", "shard": "a shard task"}.get(step, "a process of Ray")


def _lost(text: str, step: str) -> str:
    if any(sign in text for sign in _NODE_LOST) and not any(sign in text for sign in ("connection error code",)):
        return f"a machine of this Ray, or the Ray on it, was lost during the work: {RESUME}"
    if _oom_kills() > _OOM_KILLS_BEFORE:
        return f"the kernel ran out of memory and killed {_who(step)}: {_more_memory(step)}"
    return f"{_who(step)} was killed or crashed (kill, out of memory, or a fault in native code): {RESUME}"


def innermost(error: BaseException) -> BaseException:
    """The error out of Ray's wrapping, which says nothing."""
    while inside := _wrapped(error):
        error = inside[0]
    return error


def _first_line(error: BaseException) -> str:
    lines = str(innermost(error)).strip().splitlines() or ["no message"]
    return lines[0][:_LONGEST]


def _oom_kills() -> int:
    """How many processes this machine's kernel has ended for want of memory; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


_OOM_KILLS_BEFORE = _oom_kills()
