"""The operator of MedMamba: four selective scans over a feature map, in and out in pixel order.

    scan(u_BHWD, dt_BHWKR, B_BHWKN, C_BHWKN, dt_weight_KDR, dt_bias_KD, A_log_KDN, D_KD) -> y_BHWD

Its definition is reference.py. A backend is a module beside it with two functions: `scan` of the signature above, and
`unusable(device_type)`, which says why it cannot run on such a device here (None: it can). It may be imported only
when it is asked for, so it may import what is not installed everywhere.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

log = logging.getLogger(__name__)

_MODULES = {"reference": "reference", "numba": "numba_cpu", "cuda": "cuda_gpu", "mamba_ssm": "mamba_ssm_gpu"}
# What "auto" tries on a device, fastest first.
_PREFERENCE = {"cpu": ("numba", "reference"), "cuda": ("cuda", "mamba_ssm", "reference")}
_PREFERENCE_ELSEWHERE = ("reference",)


def scan(
    u_BHWD: Tensor,
    dt_BHWKR: Tensor,
    B_BHWKN: Tensor,
    C_BHWKN: Tensor,
    dt_weight_KDR: Tensor,
    dt_bias_KD: Tensor,
    A_log_KDN: Tensor,
    D_KD: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Returns y_BHWD, the sum over the four directions; see reference.py for the equation.

    ValueError: the backend is unknown or cannot run on u's device.
    """
    run = backend_scan(resolve_backend(backend, u_BHWD.device.type))
    return run(u_BHWD, dt_BHWKR, B_BHWKN, C_BHWKN, dt_weight_KDR, dt_bias_KD, A_log_KDN, D_KD)


def backend_scan(name: str) -> Callable[..., Tensor]:
    """`scan` of one resolved backend. A model keeps it, so that torch.compile finds no choice left to trace."""
    return _module(name).scan


def backends(device_type: str = "cpu") -> dict[str, str | None]:
    """Every backend by name, and why it cannot run on such a device here (None: it can)."""
    return {name: _unusable(name, device_type) for name in _MODULES}


@functools.cache
def resolve_backend(name: str = "auto", device_type: str = "cpu") -> str:
    """The backend that `name` stands for; "auto" is the first usable one and is logged the first time.

    ValueError: no such backend, or the named one cannot run here (the reason is in the message).
    """
    if name == "auto":
        usable = [n for n in _PREFERENCE.get(device_type, _PREFERENCE_ELSEWHERE) if _unusable(n, device_type) is None]
        log.info("scan backend on %s: %s", device_type, usable[0])
        return usable[0]
    if name not in _MODULES:
        raise ValueError(f"scan backend {name!r} does not exist; choose auto or one of {', '.join(_MODULES)}")
    if reason := _unusable(name, device_type):
        raise ValueError(f"scan backend {name!r} cannot run on {device_type}: {reason}; choose auto or another")
    return name


@functools.cache
def _unusable(name: str, device_type: str) -> str | None:
    try:
        return _module(name).unusable(device_type)
    except ImportError as error:
        return str(error)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")
