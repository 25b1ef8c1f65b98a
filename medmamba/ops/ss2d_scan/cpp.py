"""The scan on the CPU: scan.cpp, compiled on first use. Bit-identical for any number of threads."""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import Tensor

from medmamba.ops import cxx
from medmamba.ops.ss2d_scan import cpu_operator
from medmamba.ops.ss2d_scan.cpu_operator import Gradients, Problem

SOURCE = Path(__file__).with_name("scan.cpp")
_WIDTH, _GROUP, _CHUNK = 8, 4, 32


def unusable(device_type: str) -> str | None:
    """Why this backend cannot run on such a device; None if it can, provided that the compiler works."""
    return cpu_operator.unusable(device_type) or cxx.unusable()


def prepare(device_type: str) -> None:
    """Builds the library. Raises BuildError."""
    if device_type == "cpu":
        _library()


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("image", ctypes.c_int64),
        ("pixel", ctypes.c_int64),
        ("way", ctypes.c_int64),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int64) for n in ("images", "height", "width", "channels", "rank", "states", "splits", "slots")),
        *((n, _Rows) for n in ("dt", "b", "c")),
        *((n, ctypes.c_void_p) for n in ("u", "weight", "bias", "a", "skip")),
    )


class _Gradients(ctypes.Structure):
    _fields_ = tuple((n, ctypes.c_void_p) for n in ("u", "dt", "b", "c", "weight", "bias", "a", "skip"))


def _forward(problem: Problem, y: Tensor, kept: Tensor) -> None:
    run, read = _library().scan_forward, ctypes.byref(_read(problem))
    to = (_at(y), _at(kept) if kept.numel() else None)
    cpu_operator.spread(len(y) * problem.splits, lambda tasks: run(*map(ctypes.c_int64, tasks), read, *to))


def _backward(problem: Problem, dy: Tensor, kept: Tensor, gradients: Gradients) -> None:
    run, read = _library().scan_backward, ctypes.byref(_read(problem))
    to = (_at(dy), _at(kept), ctypes.byref(_Gradients(*(x.data_ptr() for x in gradients))))
    cpu_operator.spread(problem.slots * problem.splits, lambda tasks: run(*map(ctypes.c_int64, tasks), read, *to))


scan = cpu_operator.scan_of(cpu_operator.Loops("cpp", _WIDTH, _GROUP, _CHUNK, _forward, _backward))


def _library() -> ctypes.CDLL:
    return cxx.build(SOURCE, {"NARROW": _WIDTH, "GROUP": _GROUP, "CHUNK": _CHUNK})


def _read(problem: Problem) -> _Problem:
    u, dt, b, c, *parameters = problem[:8]
    sizes = (*u.shape, problem.weight.shape[1], problem.a.shape[1], problem.splits, problem.slots)
    rows = (_Rows(x.data_ptr(), x.stride(0), x.stride(2), x.stride(3)) for x in (dt, b, c))
    return _Problem(*sizes, *rows, u.data_ptr(), *(x.data_ptr() for x in parameters))


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
