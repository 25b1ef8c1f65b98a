"""A function of tensors as one CUDA graph: its kernels then wait for each other, never for Python."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

REHEARSALS = 3  # compile, choose algorithms, fill caches: none of it may happen inside a graph


class Captured:
    """Calls `run(*inputs)` by replaying what its first call launched.

    Inputs must keep their shapes and types; those on the CPU may lie anywhere. What `run` returns is overwritten by the
    next call. `state` are the tensors that `run` changes and that the rehearsals must leave as they were.
    """

    def __init__(
        self, run: Callable[..., torch.Tensor], device: torch.device, state: Sequence[torch.Tensor] = ()
    ) -> None:
        self._run, self._device, self._state = run, device, state
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._output = torch.empty(0)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result, on the device, until the next call."""
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
        # What it frees may wait for the device, which would end the capture. While torch compiles it finds little to
        # free among very many objects, for 3 % of the time.
        gc.disable()
        try:
            self._rehearse()
            self._graph = torch.cuda.CUDAGraph()
            # Other threads page-lock memory for the next batches meanwhile, which else would end the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = self._run(*self._inputs)
        finally:
            gc.enable()
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        torch.cuda.set_rng_state(chance, self._device)  # so that a resumed training draws what an unbroken one does

    def _rehearse(self) -> None:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(REHEARSALS):
                self._run(*self._inputs)
        torch.cuda.current_stream(self._device).wait_stream(side)
