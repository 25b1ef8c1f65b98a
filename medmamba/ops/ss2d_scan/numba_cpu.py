"""The scan on the CPU without a compiler on the machine: numba's, compiled at the first call and cached on disk.

The work is cut into tasks by the shapes alone and spread over torch.get_num_threads() threads of our own: the result
is bit-equal on any number of them, and calls from several threads at once are safe (numba's own thread pools are not
all so, and their waiting threads would fight torch's for the cores).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor

from medmamba.ops.ss2d_scan import numba_kernels as kernels

_TASKS = 8  # a small batch is also cut by channels until there are about this many tasks
_SLOTS = 32  # partial sums of the parameters' gradients, at most


def unusable(device_type: str) -> str | None:
    """Why this backend cannot run on such a device; None: it can."""
    return None if device_type in ("cpu", "meta") else "it is for the CPU; build the model for the device it runs on"


def scan(
    u_BHWD: Tensor,
    dt_BHWKR: Tensor,
    B_BHWKN: Tensor,
    C_BHWKN: Tensor,
    dt_weight_KDR: Tensor,
    dt_bias_KD: Tensor,
    A_log_KDN: Tensor,
    D_KD: Tensor,
) -> Tensor:
    """Returns y_BHWD in u's dtype, computed in float32 (see reference.py for the equation)."""
    channels, states = A_log_KDN.shape[1:]
    lacking = -channels % kernels.WIDTH
    A_KDN = -A_log_KDN.float().exp()
    inputs = [x.float() for x in (u_BHWD, dt_BHWKR, B_BHWKN, C_BHWKN)]
    parameters = [dt_weight_KDR.float(), dt_bias_KD.float(), A_KDN, D_KD.float()]
    if lacking or states % kernels.GROUP:
        inputs, parameters = _padded(inputs, parameters, lacking, -states % kernels.GROUP)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *parameters))
    y_BHWD, _ = _forward(*inputs, *parameters, keep)
    return (y_BHWD[..., :channels] if lacking else y_BHWD).to(u_BHWD.dtype)


def _padded(
    inputs: list[Tensor], parameters: list[Tensor], channels: int, states: int
) -> tuple[list[Tensor], list[Tensor]]:
    """More channels and states, of zeros: what they add to every result is zero."""
    u, dt, b, c = inputs
    weight, bias, a, skip = parameters
    inputs = [F.pad(u, (0, channels)), dt, F.pad(b, (0, states)), F.pad(c, (0, states))]
    a = F.pad(a, (0, states, 0, channels))
    return inputs, [F.pad(weight, (0, 0, 0, channels)), F.pad(bias, (0, channels)), a, F.pad(skip, (0, channels))]


# Plain registration: torch.library.custom_op imports torch._dynamo at the first call, 1.4 s in every process.
_INPUTS = "Tensor u, Tensor dt, Tensor b, Tensor c, Tensor weight, Tensor bias, Tensor a, Tensor skip"
torch.library.define("medmamba::ss2d_scan_numba", f"({_INPUTS}, bool keep) -> (Tensor, Tensor)")
torch.library.define(
    "medmamba::ss2d_scan_numba_backward", f"(Tensor dy, {_INPUTS}, Tensor kept) -> ({', '.join(['Tensor'] * 8)})"
)
_forward = torch.ops.medmamba.ss2d_scan_numba.default
_backward = torch.ops.medmamba.ss2d_scan_numba_backward.default


@torch.library.impl("medmamba::ss2d_scan_numba", "cpu")
def _run_forward(u, dt, b, c, weight, bias, a, skip, keep):
    """(y_BHWD, the states at each chunk's start, empty unless `keep`)."""
    y, kept = torch.empty(u.shape), torch.empty(_kept_size(u, a) if keep else 0)
    splits = _splits(u)
    arguments = (splits, *_arrays(u, dt, b, c, weight, bias, a, skip), keep, _flat(y), _flat(kept))
    _spread(len(u) * splits, lambda tasks: kernels.forward(tasks, *arguments))
    return y, kept


@torch.library.register_fake("medmamba::ss2d_scan_numba")
def _fake_forward(u, dt, b, c, weight, bias, a, skip, keep):
    return u.new_empty(u.shape), u.new_empty(_kept_size(u, a) if keep else 0)


@torch.library.impl("medmamba::ss2d_scan_numba_backward", "cpu")
def _run_backward(dy, u, dt, b, c, weight, bias, a, skip, kept):
    """The gradients of the eight inputs, in their order and shapes."""
    images, height, width, channels = u.shape
    (ways, _, rank), states = weight.shape, a.shape[2]
    splits, slots = _splits(u), min(images, _SLOTS)
    du = torch.empty(u.shape)
    small = [torch.empty(splits, images, height, width, ways, size) for size in (rank, states, states)]
    of_weight, of_a = torch.zeros(slots, ways, rank, channels), torch.zeros(slots, ways, states, channels)
    of_bias, of_skip = torch.zeros(slots, ways, channels), torch.zeros(slots, ways, channels)
    gradients = tuple(_flat(x) for x in (du, *small, of_weight, of_bias, of_a, of_skip))
    shape, strides, *inputs = _arrays(u, dt, b, c, weight, bias, a, skip)
    arguments = (slots, splits, shape, strides, _flat(dy), *inputs, _flat(kept), gradients)
    _spread(slots * splits, lambda tasks: kernels.backward(tasks, *arguments))
    of_inputs = (x.squeeze(0) if splits == 1 else x.sum(0) for x in small)
    of_parameters = (of_weight.sum(0).mT.contiguous(), of_bias.sum(0), of_a.sum(0).mT.contiguous(), of_skip.sum(0))
    return du, *of_inputs, *of_parameters


@torch.library.register_fake("medmamba::ss2d_scan_numba_backward")
def _fake_backward(dy, u, dt, b, c, weight, bias, a, skip, kept):
    return tuple(x.new_empty(x.shape) for x in (u, dt, b, c, weight, bias, a, skip))


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _):
    return (*_backward(dy, *ctx.saved_tensors), None)


torch.library.register_autograd("medmamba::ss2d_scan_numba", _differentiate, setup_context=_remember)


def _arrays(u, dt, b, c, weight, bias, a, skip):
    """(shape, strides, the eight inputs as flat arrays) as the kernels read them; exponents are to the base 2."""
    small = [x if x.stride(-1) == 1 and x.stride(1) == x.stride(2) * x.shape[2] else x.contiguous() for x in (dt, b, c)]
    strides = tuple((x.stride(0), x.stride(2), x.stride(3)) for x in small)
    # The views of one product are read where they lie, each from its first to its last element.
    spans = [1 + sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True)) for x in small]
    views = [x.detach().as_strided((span,), (1,)).numpy() for x, span in zip(small, spans, strict=True)]
    shape = (*u.shape, weight.shape[2], a.shape[2])
    parameters = (_flat(weight.mT), _flat(bias), _flat(a.mT * kernels.LOG2_E), _flat(skip))
    return shape, strides, _flat(u), *views, *parameters


def _flat(x: Tensor):
    return x.detach().contiguous().view(-1).numpy()


def _kept_size(u: Tensor, a: Tensor) -> int:
    images, height, width, channels = u.shape
    chunks = (height * width + kernels.CHUNK - 1) // kernels.CHUNK
    return images * a.shape[0] * chunks * channels * a.shape[2]


def _splits(u: Tensor) -> int:
    """Ranges of channels per image: a function of the shapes alone, so that sums are taken in one order."""
    return max(1, min(u.shape[3] // kernels.WIDTH, _TASKS // len(u)))


def _spread(num_tasks: int, run: Callable[[tuple[int, int]], None]) -> None:
    """Runs tasks [0, num_tasks) in equal shares on torch's number of threads; the caller's thread takes the first."""
    threads = min(torch.get_num_threads(), num_tasks)
    bounds = [num_tasks * thread // threads for thread in range(threads + 1)]
    shares = list(itertools.pairwise(bounds))
    others = [_pool(os.getpid(), threads).submit(run, share) for share in shares[1:]]
    run(shares[0])
    for other in others:
        other.result()


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so a forked process makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ss2d_scan")
