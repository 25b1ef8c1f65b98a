"""A function of tensors as one CUDA graph, so that its kernels never wait for Python."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

REHEARSALS = 3  # compiling, choosing algorithms and filling caches must not happen inside a graph


class Captured:
    """Calls `run(*inputs)` by replaying the kernels that its first call launched.

    Inputs must keep their shapes and types. The returned tensor is overwritten by the next call. `state` lists the
    tensors that `run` modifies; the rehearsals restore them.
    """

    def __init__(
        self, run: Callable[..., torch.Tensor], device: torch.device, state: Sequence[torch.Tensor] = ()
    ) -> None:
        self._run, self._device, self._state = run, device, state
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._output = torch.empty(0)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result on the device; overwritten by the next call."""
        if self._graph is None:
            self._capture(inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        return self._output

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = tuple(given.to(self._device, copy=True) for given in inputs)
        before, chance = [tensor.clone() for tensor in self._state], torch.cuda.get_rng_state(self._device)
        # Freeing objects may wait for the device, which would abort the capture. Collecting while torch compiles also
        # takes 3 % of the time and finds little to free.
        gc.disable()
        try:
            self._rehearse()
            self._graph = torch.cuda.CUDAGraph()
            # Other threads page-lock memory for the next batches; by default that would abort the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = self._run(*self._inputs)
        finally:
            gc.enable()
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        torch.cuda.set_rng_state(chance, self._device)  # a resumed training must draw the same random numbers

    def _rehearse(self) -> None:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(REHEARSALS):
                self._run(*self._inputs)
        torch.cuda.current_stream(self._device).wait_stream(side)
