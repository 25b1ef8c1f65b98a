"""The state of a training at one step as named tensors, independent of the number of ranks and the ZeRO stage."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medmamba.checkpoint import write_weights
from pipelines.worker.engine.optimizer_state import MOMENTS

STEP = "step"


@dataclass(frozen=True)
class Snapshot:
    """Copies that the training no longer modifies."""

    weights: Mapping[str, Tensor]
    """Parameters and buffers by their names in the network."""
    moments: Mapping[str, Tensor]
    """`exp_avg.<name>` and `exp_avg_sq.<name>` of every trainable parameter, and the optimizer's `step`."""
    ready: torch.cuda.Event | None = None
    """Recorded once the copies are made; None on a CPU."""

    def write(self, weights: Path, moments: Path, stream: torch.cuda.Stream | None = None) -> None:
        """Writes both parts as safetensors files.

        May run in a thread while training continues; copies on a GPU then need a separate `stream`.
        """
        with self._copied_on(stream):
            write_weights(weights, self.weights)
            save_file({name: value.cpu().contiguous() for name, value in self.moments.items()}, moments)

    def listed(self, values: Tensor, stream: torch.cuda.Stream | None = None) -> list[float]:
        """Converts a tensor (n,) that was complete when the snapshot was taken to floats; see `write` for `stream`."""
        with self._copied_on(stream):
            return [float(value) for value in values.tolist()]

    def _copied_on(self, stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
        if self.ready is None or stream is None:
            return contextlib.nullcontext()
        stream.wait_event(self.ready)
        return torch.cuda.stream(stream)


def named_moments(names: Sequence[str], moments: Mapping[str, Sequence[Tensor]], step: Tensor) -> dict[str, Tensor]:
    """Names the moments of parameters as in `Snapshot.moments`."""
    named = {f"{kind}.{name}": value for kind in MOMENTS for name, value in zip(names, moments[kind], strict=True)}
    return {**named, STEP: step}


def listed_moments(
    named: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, list[Tensor]], float]:
    """The inverse of `named_moments`, in the order of `shapes` (parameter name -> shape).

    Raises ValueError unless names and shapes match exactly.
    """
    expected = {f"{kind}.{name}": shape for kind in MOMENTS for name, shape in shapes.items()} | {STEP: torch.Size()}
    found = {name: value.shape for name, value in named.items()}
    if found != expected:
        differing = sorted({name for name, _ in found.items() ^ expected.items()})
        raise ValueError(f"the moments belong to another network: {', '.join(differing[:3])} differ")
    return {kind: [named[f"{kind}.{name}"] for name in shapes] for kind in MOMENTS}, float(named[STEP])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
