"""The operands of every scan backend, and their checks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The eight tensors of a scan; reference.py explains the axes and the equation."""

    u_BHWD: Tensor
    dt_BHWKR: Tensor
    B_BHWKN: Tensor
    C_BHWKN: Tensor
    dt_weight_KDR: Tensor
    dt_bias_KD: Tensor
    A_log_KDN: Tensor
    D_KD: Tensor


_AXES = {name.rpartition("_")[0]: name.rpartition("_")[2] for name in Operands._fields}


def check(operands: Operands) -> None:
    """Raises ValueError if the operands do not fit; compiled backends would silently read out of bounds."""
    sizes, first = {"K": 4}, operands.u_BHWD
    for (name, axes), x in zip(_AXES.items(), operands, strict=True):
        if x.ndim != len(axes) or any(
            not size or sizes.setdefault(axis, size) != size for axis, size in zip(axes, x.shape, strict=True)
        ):
            known = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if axis in axes)
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} must be ({', '.join(axes)}), all of them positive"
                f"{f', with {known}' if known else ''}; see reference.py for the axes"
            )
        if x.device != first.device or not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, but must be floating-point and on {first.device} like u; convert "
                "or move it"
            )
