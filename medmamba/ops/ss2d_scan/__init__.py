"""The operator of MedMamba: four selective scans over a feature map, in and out in pixel order.

    scan(*operands) -> y_BHWD

The operands are those of contract.py, the definition is reference.py. A backend is a module of this folder with two
functions: `scan`, and `unusable(device_type)`, which says why it cannot run on such a device here (None: it can). One
that is compiled on first use also has `prepare(device_type)`, which builds and raises BuildError: it is asked before a
backend is taken; one that builds for each size of a network has `build_ahead(sizes, dtype)`. A module may be imported
only when it is asked for, so it may import what is not installed everywhere. Compiled ones become operators of torch by
operator.py.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from medmamba.ops.build_cache import BuildError
from medmamba.ops.ss2d_scan.contract import Operands, check

log = logging.getLogger(__name__)

_BACKENDS = ("reference", "numba", "cpp", "cuda", "mamba_ssm")  # each the name of a module beside this one
# What "auto" tries on a device, fastest first.
_PREFERENCE = {"cpu": ("cpp", "numba", "reference"), "cuda": ("cuda", "mamba_ssm", "reference")}
_PREFERENCE_ELSEWHERE = ("reference",)


def scan(*operands: Tensor, backend: str = "auto") -> Tensor:
    """Returns y_BHWD, the sum over the four directions, of the tensors of `Operands`, in their order.

    ValueError: the backend is unknown or cannot run on u's device, or the tensors do not fit each other.
    """
    checked = Operands(*operands)
    check(checked)
    return backend_scan(resolve_backend(backend, checked.u_BHWD.device.type))(*checked)


def backend_scan(name: str) -> Callable[..., Tensor]:
    """`scan` of one resolved backend. A model keeps it, so that torch.compile finds no choice left to trace.

    It checks nothing: a model's tensors fit each other, whatever is fed to it.
    """
    return _module(name).scan


def backends(device_type: str = "cpu") -> dict[str, str | None]:
    """Every backend by name, and why it cannot run on such a device here (None: it can)."""
    return {name: _unusable(name, device_type) for name in _BACKENDS}


@functools.cache
def resolve_backend(name: str = "auto", device_type: str = "cpu") -> str:
    """The backend that `name` stands for; "auto" is the first that is usable and can be built, logged the first time.

    ValueError: no such backend, or the named one cannot run here (the reason is in the message).
    """
    if name == "auto":
        return _fastest(device_type)
    if name not in _BACKENDS:
        raise ValueError(f"scan backend {name!r} does not exist; choose auto or one of {', '.join(_BACKENDS)}")
    if reason := _unusable(name, device_type) or _unbuilt(name, device_type):
        raise ValueError(f"scan backend {name!r} cannot run on {device_type}: {reason}; choose auto or another")
    return name


def build_ahead(name: str, sizes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """Builds what a resolved backend would build on first use for scans of these (channels, rank, states)."""
    if build := getattr(_module(name), "build_ahead", None):
        build(sizes, dtype)


def _fastest(device_type: str) -> str:
    *preferred, chosen = _PREFERENCE.get(device_type, _PREFERENCE_ELSEWHERE)
    for name in preferred:
        if _unusable(name, device_type):
            continue
        if (reason := _unbuilt(name, device_type)) is None:
            chosen = name
            break
        log.warning("scan backend %s cannot be built here, the next one is taken: %s", name, reason)
    log.info("scan backend on %s: %s", device_type, chosen)
    return chosen


@functools.cache
def _unusable(name: str, device_type: str) -> str | None:
    try:
        return _module(name).unusable(device_type)
    except ImportError as error:
        return str(error)


def _unbuilt(name: str, device_type: str) -> str | None:
    """Why the backend's code cannot be built here; None: it is built now, or needs no building."""
    try:
        if prepare := getattr(_module(name), "prepare", None):
            prepare(device_type)
    except BuildError as error:
        return str(error)
    return None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
