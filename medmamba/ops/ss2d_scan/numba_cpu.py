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


@torch.library.custom_op("medmamba::ss2d_scan_numba", mutates_args=(), device_types="cpu")
def _forward(
    u: Tensor, dt: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor, a: Tensor, skip: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y_BHWD, the states at each chunk's start, empty unless `keep`)."""
    y = torch.empty(u.shape)
    kept = torch.empty(_kept_size(u, a) if keep else 0)
    images, height, width, channels = u.shape
    splits = _splits(images, channels)
    arguments = (splits, (height, width), *_arrays(u, dt, b, c, weight, bias, a, skip), keep, _flat(y), kept.numpy())
    _spread(images * splits, lambda tasks: kernels.forward(tasks, *arguments))
    return y, kept


@_forward.register_fake
def _(u, dt, b, c, weight, bias, a, skip, keep):
    return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(_kept_size(u, a) if keep else 0)


@torch.library.custom_op("medmamba::ss2d_scan_numba_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    u: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor,
    a: Tensor,
    skip: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the eight inputs, in their order and shapes."""
    images, height, width, channels = u.shape
    (ways, _, rank), states = weight.shape, a.shape[2]
    splits, slots = _splits(images, channels), min(images, _SLOTS)
    du = torch.empty(u.shape)
    small = [torch.empty(splits, images, height * width, ways, size) for size in (rank, states, states)]
    of_weight, of_a = torch.zeros(slots, ways, rank, channels), torch.zeros(slots, ways, states, channels)
    of_bias, of_skip = torch.zeros(slots, ways, channels), torch.zeros(slots, ways, channels)
    gradients = (_flat(du), *(x.numpy() for x in small), _flat(of_weight), _flat(of_bias), _flat(of_a), _flat(of_skip))
    inputs = _arrays(u, dt, b, c, weight, bias, a, skip)
    arguments = (slots, splits, (height, width), _flat(dy), *inputs, kept.numpy(), gradients)
    _spread(slots * splits, lambda tasks: kernels.backward(tasks, *arguments))
    ddt, db, dc = (x.sum(0).unflatten(1, (height, width)) for x in small)
    parameters = (of_weight.sum(0).mT.contiguous(), of_bias.sum(0), of_a.sum(0).mT.contiguous(), of_skip.sum(0))
    return du, ddt, db, dc, *parameters


@_backward.register_fake
def _(dy, u, dt, b, c, weight, bias, a, skip, kept):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, b, c, weight, bias, a, skip)
    )


def _remember(ctx, inputs, output) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _):
    return (*_backward(dy, *ctx.saved_tensors), None)


_forward.register_autograd(_differentiate, setup_context=_remember)


def _arrays(u, dt, b, c, weight, bias, a, skip):
    """The inputs as the kernels read them: pixels in one dimension, channels last, exponents to the base 2."""
    small = (x.flatten(1, 2).numpy() for x in (dt, b, c))
    return _flat(u), *small, _flat(weight.mT), _flat(bias), _flat(a.mT * kernels.LOG2_E), _flat(skip)


def _flat(x: Tensor):
    return x.detach().contiguous().view(-1).numpy()


def _kept_size(u: Tensor, a: Tensor) -> int:
    images, height, width, channels = u.shape
    chunks = (height * width + kernels.CHUNK - 1) // kernels.CHUNK
    return images * a.shape[0] * chunks * channels * a.shape[2]


def _splits(images: int, channels: int) -> int:
    """Ranges of channels per image: a function of the shapes alone, so that sums are taken in one order."""
    return max(1, min(channels // kernels.WIDTH, _TASKS // images))


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
