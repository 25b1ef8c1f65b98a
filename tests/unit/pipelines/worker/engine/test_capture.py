"""A training step as a CUDA graph: the numbers of the same step launched kernel by kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines.worker.engine.capture import Captured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda", 0)


class Noisy(nn.Module):
    """Draws random numbers and changes a buffer, as drop-path and BatchNorm do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, 8) -> (B, 3)."""
        hidden = self.norm(inputs)
        return self.out(hidden * hidden.new_empty(len(hidden), 1).bernoulli_(0.5))


def built() -> tuple[Noisy, list[torch.Tensor], object]:
    torch.manual_seed(0)
    model = Noisy().to(GPU)
    gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]

    def run(inputs: torch.Tensor) -> torch.Tensor:
        loss = model(inputs).square().mean()
        torch._foreach_copy_(gradients, torch.autograd.grad(loss, list(model.parameters())))
        return loss.detach()

    return model, gradients, run


def inputs(step: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(GPU)


def test_replayed_steps_are_those_of_the_function():
    alone, expected_gradients, run = built()
    model, gradients, again = built()
    captured = Captured(again, GPU, state=list(model.buffers()))
    for step in range(4):
        torch.manual_seed(100 + step)
        expected = run(inputs(step))
        torch.manual_seed(100 + step)
        found = captured(inputs(step))
        assert torch.equal(found, expected), f"step {step}: another loss"
        assert all(map(torch.equal, gradients, expected_gradients)), f"step {step}: other gradients"
        assert torch.equal(model.norm.running_mean, alone.norm.running_mean), f"step {step}: rehearsals are left in"
        assert int(model.norm.num_batches_tracked) == step + 1


def test_page_locking_in_another_thread_does_not_end_a_capture():
    import threading

    model, _, run = built()
    stop = threading.Event()

    def lock() -> None:
        held = []
        while not stop.is_set():
            held.append(torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True))

    thread = threading.Thread(target=lock, daemon=True)
    thread.start()
    try:
        for step in range(5):
            Captured(run, GPU, state=list(model.buffers()))(inputs(step))
    finally:
        stop.set()
        thread.join()
