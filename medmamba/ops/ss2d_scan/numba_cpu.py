"""The scan on the CPU without a compiler on the machine: numba's, compiled at the first call and cached on disk.

The tasks are spread over torch.get_num_threads() threads of our own: calls from several threads at once are safe
(numba's own thread pools are not all so, and their waiting threads would fight torch's for the cores).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from medmamba.ops.ss2d_scan import cpu_operator
from medmamba.ops.ss2d_scan import numba_kernels as kernels
from medmamba.ops.ss2d_scan.cpu_operator import Gradients, Problem
from medmamba.ops.ss2d_scan.cpu_operator import unusable as unusable  # part of a backend


def _forward(problem: Problem, y: Tensor, kept: Tensor) -> None:
    arguments = (problem.splits, *_arrays(problem), kept.numel() > 0, _flat(y), _flat(kept))
    _spread(len(y) * problem.splits, lambda tasks: kernels.forward(tasks, *arguments))


def _backward(problem: Problem, dy: Tensor, kept: Tensor, gradients: Gradients) -> None:
    shape, strides, *inputs = _arrays(problem)
    to = tuple(_flat(x) for x in gradients)
    arguments = (problem.slots, problem.splits, shape, strides, _flat(dy), *inputs, _flat(kept), to)
    _spread(problem.slots * problem.splits, lambda tasks: kernels.backward(tasks, *arguments))


scan = cpu_operator.register(
    cpu_operator.Loops("numba", kernels.WIDTH, kernels.GROUP, kernels.CHUNK, _forward, _backward)
)


def _arrays(problem: Problem):
    """(shape, strides, the eight inputs as flat arrays) as the kernels read them."""
    u, dt, b, c, *parameters = problem[:8]
    strides = tuple((x.stride(0), x.stride(2), x.stride(3)) for x in (dt, b, c))
    # A view is read from its first to its last element.
    spans = [1 + sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True)) for x in (dt, b, c)]
    views = [x.detach().as_strided((span,), (1,)).numpy() for x, span in zip((dt, b, c), spans, strict=True)]
    shape = (*u.shape, problem.weight.shape[1], problem.a.shape[1])
    return shape, strides, _flat(u), *views, *(_flat(x) for x in parameters)


def _flat(x: Tensor):
    return x.detach().view(-1).numpy()


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
