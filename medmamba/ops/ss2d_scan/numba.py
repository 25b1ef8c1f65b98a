"""The scan on the CPU with numba, which needs no C++ compiler; compiled at the first call and cached on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from medmamba.ops.ss2d_scan import cpu_operator
from medmamba.ops.ss2d_scan import numba_kernels as kernels
from medmamba.ops.ss2d_scan.cpu_operator import Gradients, Problem
from medmamba.ops.ss2d_scan.cpu_operator import unusable as unusable  # every backend has this function


def _forward(problem: Problem, y: Tensor, kept: Tensor) -> None:
    arguments = (problem.splits, *_arrays(problem), kept.numel() > 0, _flat(y), _flat(kept))
    cpu_operator.spread(len(y) * problem.splits, lambda tasks: kernels.forward(tasks, *arguments))


def _backward(problem: Problem, dy: Tensor, kept: Tensor, gradients: Gradients) -> None:
    shape, strides, *inputs = _arrays(problem)
    to = tuple(_flat(x) for x in gradients)
    arguments = (problem.slots, problem.splits, shape, strides, _flat(dy), *inputs, _flat(kept), to)
    cpu_operator.spread(problem.slots * problem.splits, lambda tasks: kernels.backward(tasks, *arguments))


scan = cpu_operator.scan_of(
    cpu_operator.Loops("numba", kernels.WIDTH, kernels.GROUP, kernels.CHUNK, _forward, _backward)
)


def _arrays(problem: Problem) -> tuple[Any, ...]:
    """The kernels' arguments: (shape, strides, the eight inputs as flat arrays)."""
    u, dt, b, c, *parameters = problem[:8]
    strides = tuple((x.stride(0), x.stride(2), x.stride(3)) for x in (dt, b, c))
    # Views become arrays that span from their first to their last element.
    spans = [1 + sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True)) for x in (dt, b, c)]
    views = [x.detach().as_strided((span,), (1,)).numpy() for x, span in zip((dt, b, c), spans, strict=True)]
    shape = (*u.shape, problem.weight.shape[1], problem.a.shape[1])
    return shape, strides, _flat(u), *views, *(_flat(x) for x in parameters)


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().view(-1).numpy()
