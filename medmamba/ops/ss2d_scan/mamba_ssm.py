"""The scan with mamba-ssm's compiled kernels and upstream's arithmetic, as a baseline if mamba-ssm is installed.

As in upstream's SS2D, the sequence is copied four times, channels first; delta is computed in the dtype of the
activations, and delta, u, B and C enter the kernels in float32; the kernels apply softplus, the bias and D; the four
results are reordered and summed in float32. mamba-ssm sums the gradients of A, B and C with atomics, so they vary
between runs. Unlike upstream, dt, B and C come from one product over the pixels, so only these few channels are
reordered four times.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from medmamba.ops.ss2d_scan.contract import Operands
from medmamba.ops.ss2d_scan.operator import register

_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
_EXTENSION = "selective_scan_cuda"  # mamba-ssm's extension; mamba_ssm itself would import triton and transformers
_CHUNK = 2048  # positions between two states that the forward kernel keeps


def unusable(device_type: str) -> str | None:
    """Why this backend cannot run on such a device; None if it can."""
    if device_type not in ("cuda", "meta"):
        return "it requires a CUDA device"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        _extension()
    except ImportError as error:
        return f"mamba-ssm's scan cannot be imported ({error}); install mamba-ssm with MAMBA_KEEP_CUDA_BUILD=TRUE"
    return None


def scan(*operands: Tensor) -> Tensor:
    """Returns y_BHWD in u's dtype (see reference.py for the equation)."""
    given = Operands(*operands)
    height, width = given.u_BHWD.shape[1:3]
    dtype = given.u_BHWD.dtype if given.u_BHWD.dtype in _ACTIVATIONS else torch.float32
    with torch.autocast(given.u_BHWD.device.type, enabled=False):
        u_BKDL = _in_four_orders(given.u_BHWD.to(dtype).unsqueeze(3).expand(-1, -1, -1, 4, -1))
        dt_BKRL, B_BKNL, C_BKNL = (_in_four_orders(x.to(dtype)) for x in (given.dt_BHWKR, given.B_BHWKN, given.C_BHWKN))
        delta_BKDL = torch.einsum("bkrl,kdr->bkdl", dt_BKRL, given.dt_weight_KDR.to(dtype))
        y_BEL, _ = _forward(
            u_BKDL.float().flatten(1, 2),
            delta_BKDL.float().flatten(1, 2),
            -given.A_log_KDN.float().exp().flatten(0, 1),
            B_BKNL.float(),
            C_BKNL.float(),
            given.D_KD.float().flatten(),
            given.dt_bias_KD.float().flatten(),
        )
        y_BKDL = torch.unflatten(y_BEL, 1, u_BKDL.shape[1:3])
        return _summed_in_pixel_order(y_BKDL, height, width).to(given.u_BHWD.dtype)


def _in_four_orders(x_BHWKF: Tensor) -> Tensor:
    """The sequence that each direction reads, channels first: (B, K, F, L)."""
    row, column, row_reversed, column_reversed = x_BHWKF.permute(0, 3, 4, 1, 2).unbind(1)
    return torch.stack(
        (
            row.flatten(2),
            column.transpose(2, 3).flatten(2),
            row_reversed.flatten(2).flip(2),
            column_reversed.transpose(2, 3).flatten(2).flip(2),
        ),
        dim=1,
    )


def _summed_in_pixel_order(y_BKDL: Tensor, height: int, width: int) -> Tensor:
    """The sum of the four sequences in pixel order: (B, H, W, D)."""
    row, column, row_reversed, column_reversed = y_BKDL.unbind(1)
    by_row = torch.unflatten(row + row_reversed.flip(2), 2, (height, width))
    by_column = torch.unflatten(column + column_reversed.flip(2), 2, (width, height))
    return (by_row + by_column.transpose(2, 3)).permute(0, 2, 3, 1)


@functools.cache
def _extension() -> ModuleType:
    """The compiled part of mamba-ssm's selective_scan_fn, with fwd and bwd."""
    return importlib.import_module(_EXTENSION)


def _run_forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (y, the states at each chunk's end)."""
    u, delta, a, b, c, d, bias = (x.contiguous() for x in inputs)
    y, kept = _extension().fwd(u, delta, a, b, c, d, None, bias, True)
    return y, kept


def _shapes(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    images, channels, length = u.shape
    return u.new_empty(u.shape), u.new_empty(images, channels, -(-length // _CHUNK), 2 * a.shape[1])


def _run_backward(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients of the seven inputs, in their order and shapes."""
    dy, u, delta, a, b, c, d, bias, kept = (x.contiguous() for x in inputs)
    return tuple(_extension().bwd(u, delta, a, b, c, d, None, bias, dy, kept, None, None, True, False))


# u and delta (B, K·D, L), a (K·D, N), b and c (B, K, N, L), d and bias (K·D), all in float32.
_forward = register(
    "selective_scan",
    backend="mamba_ssm",
    device="cuda",
    forward=_run_forward,
    shapes=_shapes,
    backward=_run_backward,
    inputs=("u", "delta", "a", "b", "c", "d", "bias"),
    keeps=False,
)
