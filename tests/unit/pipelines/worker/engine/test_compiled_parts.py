"""MedMamba compiled in parts: the function it is, and a stage's blocks compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from medmamba.config import MedMambaConfig
from medmamba.model import MedMamba, build_model, compiled_parts, exchanged
from pipelines.worker.engine.flat import FlatParameters

CONFIG = MedMambaConfig(dims=(8, 16), depths=(2, 3), num_classes=3, drop_path=0.4)
KINDS = 5  # stem, block of each stage, merging, head


class Compiler:
    """torch.compile up to the graphs, which run as they were traced."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False, backend=self._counted)

    def _counted(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> MedMamba:
    torch.manual_seed(0)
    model = build_model(CONFIG, scan="reference")
    assert isinstance(model, MedMamba)
    FlatParameters(model, [{"params": list(model.parameters())}])  # weights are views, as in a training
    return model.train()


def trained(model: MedMamba, images: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    scores = model(images)
    return [scores, *torch.autograd.grad(scores.square().mean(), list(model.parameters()))]


def test_parts_draw_and_compute_what_the_network_does():
    images, compiler, whole, model = torch.randn(4, 3, 32, 32), Compiler(), network(), network()
    with exchanged(compiled_parts(model, compiler)):
        found = trained(model, images)
    assert all(map(torch.equal, found, trained(whole, images)))


def test_blocks_of_a_stage_are_compiled_once():
    compiler, model = Compiler(), network()
    with exchanged(compiled_parts(model, compiler)):
        for _ in range(2):
            trained(model, torch.randn(4, 3, 32, 32))
    assert compiler.graphs == KINDS


def test_outside_of_a_training_step_nothing_is_compiled():
    compiler, model = Compiler(), network()
    parts = compiled_parts(model, compiler)
    with exchanged(parts):
        pass
    model.eval()(torch.randn(4, 3, 32, 32))
    assert compiler.graphs == 0
    assert not [name for owner, name, _ in parts if name in vars(owner)]
