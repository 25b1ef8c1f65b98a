"""Compiles C++ on first use with the machine's compiler for its CPU; the code is called through ctypes.

The sources include no headers of torch or Python, so they compile in seconds and work with every version of both.
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
# A subset of -ffast-math that preserves NaN and the order of sums.
_OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_LINKED = ("-shared", "-fPIC")


def build(source: Path, settings: Mapping[str, int]) -> ctypes.CDLL:
    """The library of a C++ source, with each setting as a macro. Raises BuildError."""
    return _build(source, tuple(sorted(settings.items())))


def unusable() -> str | None:
    """Why nothing can be built here, without trying to build; None if it probably can."""
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
            f"{library} cannot be loaded ({error}): delete it, or set XDG_CACHE_HOME to a folder that allows execution"
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
    raise BuildError(
        f"CXX={named[0]} not found; set it to a C++ compiler"
        if named
        else "no C++ compiler found: install g++ or clang, or set CXX"
    )


def _target() -> str:
    """The compiler's version and this CPU's features; machines of different kinds may share a cache."""
    return _run([*_compiler(), _NATIVE, "-dM", "-E", "-x", "c++", os.devnull])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from None
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} exited with {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout
