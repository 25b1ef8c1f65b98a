"""Shared by the CPU backends: turns loops over vectors of channels into a torch operator.

Tasks depend only on the shapes, so the result is bit-identical for any number of threads. The thread pool is separate:
concurrent calls are safe (not all of numba's pools allow that, and their waiting threads compete with torch's for
cores), and waking a waiting thread is faster than starting one.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor

from medmamba.ops.ss2d_scan import operator
from medmamba.ops.ss2d_scan.contract import Operands

_TASKS = 8  # small batches are also split by channels, until there are about this many tasks
_LOG2_E = 1.4426950408889634
_SLOTS = 32  # maximum number of partial sums of the parameters' gradients


class Problem(NamedTuple):
    """The float32 inputs of the loops: `a` is scaled for exp2; dt, b and c may be views with a dense last axis.

    A task is one image (in backward one slot, which is every `slots`-th image) and one of `splits` ranges of channels.
    """

    u: Tensor  # BHWD
    dt: Tensor  # BHWKR
    b: Tensor  # BHWKN
    c: Tensor  # BHWKN
    weight: Tensor  # KRD
    bias: Tensor  # KD
    a: Tensor  # KND
    skip: Tensor  # KD
    splits: int
    slots: int


class Gradients(NamedTuple):
    """The outputs of the backward loops, for S splits and G slots; the last four must be zeros initially."""

    u: Tensor  # BHWD
    dt: Tensor  # SBHWKR
    b: Tensor  # SBHWKN
    c: Tensor  # SBHWKN
    weight: Tensor  # GKRD
    bias: Tensor  # GKD
    a: Tensor  # GKND
    skip: Tensor  # GKD


@dataclass(frozen=True)
class Loops:
    """The loops of one backend. D is a multiple of `width`, N of `group`; states are kept every `chunk` positions.

    forward(problem, y_BHWD, kept): keeps nothing if `kept` is empty.
    backward(problem, dy_BHWD, kept, gradients).
    """

    name: str
    width: int
    group: int
    chunk: int
    forward: Callable[[Problem, Tensor, Tensor], None]
    backward: Callable[[Problem, Tensor, Tensor, Gradients], None]

    def kept_size(self, *inputs: Tensor) -> int:
        """Number of floats kept from forward to backward."""
        u, a = inputs[0], inputs[6]
        images, height, width, channels = u.shape
        return images * a.shape[0] * -(-height * width // self.chunk) * channels * a.shape[2]


def unusable(device_type: str) -> str | None:
    """Why no CPU backend can run on such a device; None if it can."""
    return None if device_type in ("cpu", "meta") else "it requires the CPU; build the model for the device it runs on"


def scan_of(loops: Loops) -> Callable[..., Tensor]:
    """Registers a backend's loops as the operator medmamba::ss2d_scan_<name>; returns its `scan`."""

    def run_forward(*inputs_and_keep: Any) -> tuple[Tensor, Tensor]:
        """Returns (y_BHWD, the states at each chunk's start, empty unless `keep`)."""
        *inputs, keep = inputs_and_keep
        y, kept = torch.empty(inputs[0].shape), torch.empty(loops.kept_size(*inputs) if keep else 0)
        loops.forward(_problem(loops.width, *inputs), y, kept)
        return y, kept

    def shapes(u: Tensor, *others_and_keep: Any) -> tuple[Tensor, Tensor]:
        *others, keep = others_and_keep
        return u.new_empty(u.shape), u.new_empty(loops.kept_size(u, *others) if keep else 0)

    def run_backward(dy: Tensor, *inputs_and_kept: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of the eight inputs, in their order and shapes."""
        *inputs, kept = inputs_and_kept
        problem = _problem(loops.width, *inputs)
        small = [torch.empty(problem.splits, *x.shape) for x in inputs[1:4]]
        parameters = (problem.weight, problem.bias, problem.a, problem.skip)
        sums = [torch.zeros(problem.slots, *x.shape) for x in parameters]
        found = Gradients(torch.empty(inputs[0].shape), *small, *sums)
        loops.backward(problem, dy.contiguous(), kept, found)
        of_inputs = [x.squeeze(0) if problem.splits == 1 else x.sum(0) for x in small]
        of_weight, of_bias, of_a, of_skip = (x.sum(0) for x in sums)
        return found.u, *of_inputs, of_weight.mT.contiguous(), of_bias, of_a.mT.contiguous(), of_skip

    forward = operator.register(
        f"ss2d_scan_{loops.name}",
        backend=loops.name,
        device="cpu",
        forward=run_forward,
        shapes=shapes,
        backward=run_backward,
    )

    def scan(*operands: Tensor) -> Tensor:
        """Returns y_BHWD in u's dtype, computed in float32 (see reference.py for the equation)."""
        given = Operands(*operands)
        channels, states = given.A_log_KDN.shape[1:]
        lacking, lacking_states = -channels % loops.width, -states % loops.group
        A_KDN = -given.A_log_KDN.float().exp()
        inputs = [x.float() for x in (given.u_BHWD, given.dt_BHWKR, given.B_BHWKN, given.C_BHWKN)]
        parameters = [given.dt_weight_KDR.float(), given.dt_bias_KD.float(), A_KDN, given.D_KD.float()]
        if lacking or lacking_states:
            inputs, parameters = _padded(inputs, parameters, lacking, lacking_states)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *parameters))
        y_BHWD, _ = forward(*inputs, *parameters, keep)
        return (y_BHWD[..., :channels] if lacking else y_BHWD).to(given.u_BHWD.dtype)

    return scan


def _padded(
    inputs: list[Tensor], parameters: list[Tensor], channels: int, states: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Pads channels and states with zeros, which do not change any result."""
    u, dt, b, c = inputs
    weight, bias, a, skip = parameters
    inputs = [F.pad(u, (0, channels)), dt, F.pad(b, (0, states)), F.pad(c, (0, states))]
    a = F.pad(a, (0, states, 0, channels))
    return inputs, [F.pad(weight, (0, 0, 0, channels)), F.pad(bias, (0, channels)), a, F.pad(skip, (0, channels))]


def _problem(
    width: int, u: Tensor, dt: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor, a: Tensor, skip: Tensor
) -> Problem:
    dt, b, c = (_rows(x) for x in (dt, b, c))
    weight, bias, a, skip = (x.contiguous() for x in (weight.mT, bias, a.mT * _LOG2_E, skip))
    images, channels = u.shape[0], u.shape[3]
    splits = max(1, min(channels // width, _TASKS // images))
    return Problem(u.contiguous(), dt, b, c, weight, bias, a, skip, splits, min(images, _SLOTS))


def _rows(x: Tensor) -> Tensor:
    """dt, B or C in a layout that the loops can read; copied unless its rows are dense and evenly spaced."""
    return x if x.stride(-1) == 1 and x.stride(1) == x.stride(2) * x.shape[2] else x.contiguous()


def spread(num_tasks: int, run: Callable[[tuple[int, int]], None]) -> None:
    """Runs tasks [0, num_tasks) in equal shares on torch's number of threads, the first share on the caller's."""
    threads = min(torch.get_num_threads(), num_tasks)
    bounds = [num_tasks * thread // threads for thread in range(threads + 1)]
    shares = list(itertools.pairwise(bounds))
    others = [_pool(os.getpid(), threads).submit(run, share) for share in shares[1:]]
    try:
        run(shares[0])
    finally:
        wait(others)  # also after Ctrl-C: they write into tensors that the caller then releases
    for other in others:
        other.result()


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool per process, because threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ss2d_scan")
