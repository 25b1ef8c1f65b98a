"""C++ compiled on first use by the machine's own compiler for its own CPU, and called through ctypes.

The sources include nothing of torch and Python: they compile in seconds, and fit every version of both.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from medmamba.ops.build_cache import BuildError, kept

_NATIVE = "-march=native"
# What is left out of -ffast-math: a NaN stays a NaN, and sums keep their order.
_OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_LINKED = ("-shared", "-fPIC")


def build(source: Path, settings: Mapping[str, int]) -> ctypes.CDLL:
    """The library of a C++ source with each setting as a macro. BuildError: why not."""
    return _build(source, tuple(sorted(settings.items())))


def unusable() -> str | None:
    """Why nothing can be built here, as far as can be said without building; None: it can."""
    try:
        _compiler()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def _build(source: Path, settings: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    command = (*_compiler(), _NATIVE, *_OPTIONS, *_LINKED, *(f"-D{name}={value}" for name, value in settings))
    library = kept(source, "so", (command, _target()), lambda code: _compiled(source, command))
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(
            f"{library} does not load ({error}): delete it, or name a folder that allows code in XDG_CACHE_HOME"
        ) from None


def _compiled(source: Path, command: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        _run([*command, str(source), "-o", str(library)])
        return library.read_bytes()


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(command[0]):
            return command
    raise BuildError(f"CXX={named[0]} is not there" if named else "no C++ compiler: install g++ or clang, or set CXX")


def _target() -> str:
    """The compiler's version and this CPU's instructions: a cache on a shared disk serves machines of several kinds."""
    return _run([*_compiler(), _NATIVE, "-dM", "-E", "-x", "c++", os.devnull])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from None
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} exited with {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout
