"""MedMamba's operator: four selective scans over a feature map, with inputs and outputs in pixel order.

    scan(*operands) -> y_BHWD

contract.py defines the operands, reference.py the function. A backend is a module of this folder with two functions:
`scan`, and `unusable(device_type)`, which returns why it cannot run on such a device here, or None. A backend that is
compiled on first use also has `prepare(device_type)`, which builds it or raises BuildError before it is chosen; one
that builds separately for each size has `build_ahead(sizes, dtype)`. Backends are imported on demand, so they may
import packages that are not installed everywhere. operator.py turns compiled backends into torch operators.
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

_BACKENDS = ("reference", "numba", "cpp", "cuda", "mamba_ssm")  # names of modules in this folder
# Backends that "auto" tries on a device, fastest first.
_PREFERENCE = {"cpu": ("cpp", "numba", "reference"), "cuda": ("cuda", "mamba_ssm", "reference")}
_PREFERENCE_ELSEWHERE = ("reference",)


def scan(*operands: Tensor, backend: str = "auto") -> Tensor:
    """Scans the tensors of `Operands`, given in order; returns y_BHWD, the sum over the four directions.

    Raises ValueError if the backend is unknown or cannot run on u's device, or if the tensors do not fit.
    """
    checked = Operands(*operands)
    check(checked)
    return backend_scan(resolve_backend(backend, checked.u_BHWD.device.type))(*checked)


def backend_scan(name: str) -> Callable[..., Tensor]:
    """The `scan` function of a resolved backend, without checks.

    A model stores it so that torch.compile has no choice to trace; a model's tensors always fit.
    """
    backend: Callable[..., Tensor] = _module(name).scan
    return backend


def backends(device_type: str = "cpu") -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run on such a device here, or None."""
    return {name: _unusable(name, device_type) for name in _BACKENDS}


@functools.cache
def resolve_backend(name: str = "auto", device_type: str = "cpu") -> str:
    """Resolves a backend name; "auto" becomes the first backend that is usable and can be built, and is logged once.

    Raises ValueError, with the reason, if the backend is unknown or cannot run here.
    """
    if name == "auto":
        return _fastest(device_type)
    if name not in _BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; available: auto, {', '.join(_BACKENDS)}")
    if reason := _unusable(name, device_type) or _unbuilt(name, device_type):
        raise ValueError(f"scan backend {name!r} cannot run on {device_type}: {reason}; choose auto or another")
    return name


def build_ahead(name: str, sizes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """Builds in advance what a resolved backend would build on first use for these (channels, rank, states)."""
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
        log.warning("scan backend %s cannot be built here, trying the next one: %s", name, reason)
    log.info("scan backend on %s: %s", device_type, chosen)
    return chosen


@functools.cache
def _unusable(name: str, device_type: str) -> str | None:
    try:
        reason: str | None = _module(name).unusable(device_type)
    except ImportError as error:
        return str(error)
    return reason


def _unbuilt(name: str, device_type: str) -> str | None:
    """Why the backend's code cannot be built here; None if it is built now or needs no building."""
    try:
        if prepare := getattr(_module(name), "prepare", None):
            prepare(device_type)
    except BuildError as error:
        return str(error)
    return None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
