"""What the CPU backends share: how loops over lanes of channels become an operator of torch.

The work is cut into tasks by the shapes alone, so the result is bit-equal on any number of threads. The threads are our
own: calls from several threads at once are safe (numba's own pools are not all so, and their waiting threads would
fight torch's for the cores), and waiting ones are woken sooner than new ones get a core beside torch's.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor

from medmamba.ops.ss2d_scan import operator
from medmamba.ops.ss2d_scan.contract import Operands

_TASKS = 8  # a small batch is also cut by channels until there are about this many tasks
_LOG2_E = 1.4426950408889634
_SLOTS = 32  # partial sums of the parameters' gradients, at most


class Problem(NamedTuple):
    """The inputs as the loops read them, float32: a is that of exp2; dt, b and c may be views with a dense last axis.

    A task is one image (backwards one slot, every `slots`-th image) and one of `splits` ranges of channels.
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
    """What the backward loops fill: S splits; the last four, a row for each slot G, come filled with zeros."""

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
    """One backend. D comes as a multiple of `width`, N of `group`; every `chunk` positions the states are kept.

    forward(problem, y_BHWD, kept), where an empty `kept` means that nothing is to be kept;
    backward(problem, dy_BHWD, kept, gradients).
    """

    name: str
    width: int
    group: int
    chunk: int
    forward: Callable[[Problem, Tensor, Tensor], None]
    backward: Callable[[Problem, Tensor, Tensor, Gradients], None]

    def kept_size(self, *inputs: Tensor) -> int:
        """Numbers kept from forward to backward."""
        u, a = inputs[0], inputs[6]
        images, height, width, channels = u.shape
        return images * a.shape[0] * -(-height * width // self.chunk) * channels * a.shape[2]


def unusable(device_type: str) -> str | None:
    """Why no CPU backend can run on such a device; None: it can."""
    return None if device_type in ("cpu", "meta") else "it is for the CPU; build the model for the device it runs on"


def scan_of(loops: Loops) -> Callable[..., Tensor]:
    """The `scan` of a backend, whose loops become the operator medmamba::ss2d_scan_<name>."""

    def run_forward(*inputs_and_keep):
        """(y_BHWD, the states at each chunk's start, empty unless `keep`)."""
        *inputs, keep = inputs_and_keep
        y, kept = torch.empty(inputs[0].shape), torch.empty(loops.kept_size(*inputs) if keep else 0)
        loops.forward(_problem(loops.width, *inputs), y, kept)
        return y, kept

    def shapes(u, *others_and_keep):
        *others, keep = others_and_keep
        return u.new_empty(u.shape), u.new_empty(loops.kept_size(u, *others) if keep else 0)

    def run_backward(dy, *inputs_and_kept):
        """The gradients of the eight inputs, in their order and shapes."""
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
    """More channels and states, of zeros: what they add to every result is zero."""
    u, dt, b, c = inputs
    weight, bias, a, skip = parameters
    inputs = [F.pad(u, (0, channels)), dt, F.pad(b, (0, states)), F.pad(c, (0, states))]
    a = F.pad(a, (0, states, 0, channels))
    return inputs, [F.pad(weight, (0, 0, 0, channels)), F.pad(bias, (0, channels)), a, F.pad(skip, (0, channels))]


def _problem(width: int, u, dt, b, c, weight, bias, a, skip) -> Problem:
    dt, b, c = (_rows(x) for x in (dt, b, c))
    weight, bias, a, skip = (x.contiguous() for x in (weight.mT, bias, a.mT * _LOG2_E, skip))
    images, channels = u.shape[0], u.shape[3]
    splits = max(1, min(channels // width, _TASKS // images))
    return Problem(u.contiguous(), dt, b, c, weight, bias, a, skip, splits, min(images, _SLOTS))


def _rows(x: Tensor) -> Tensor:
    """dt, B or C as the loops can read it: a view of one product as it lies, anything else copied."""
    return x if x.stride(-1) == 1 and x.stride(1) == x.stride(2) * x.shape[2] else x.contiguous()


def spread(num_tasks: int, run: Callable[[tuple[int, int]], None]) -> None:
    """Runs tasks [0, num_tasks) in equal shares on torch's number of threads; the caller's thread takes the first."""
    threads = min(torch.get_num_threads(), num_tasks)
    bounds = [num_tasks * thread // threads for thread in range(threads + 1)]
    shares = list(itertools.pairwise(bounds))
    others = [_pool(os.getpid(), threads).submit(run, share) for share in shares[1:]]
    try:
        run(shares[0])
    finally:
        wait(others)  # also after a Ctrl-C: they write into tensors that the caller then lets go
    for other in others:
        other.result()


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so a forked process makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ss2d_scan")
