"""A row of `medmamba bench` that cannot be measured says why, also from a process of its own."""

import os

import pytest
import torch

from medmamba import bench

CASE = bench.Case("nano", 1, 64, "float32", "cuda", "cuda", compiled=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the case would be measured")
def test_a_gpus_row_is_measured_in_another_process_and_brings_its_reason_back():
    row = bench.measure_alone(CASE)
    assert row.case == CASE
    assert row.why_not == "backend cuda: torch sees no CUDA device"


def die(case, *, repeats):
    os._exit(9)


def test_a_row_whose_process_dies_says_so(monkeypatch):
    monkeypatch.setattr(bench, "measure", die)
    row = bench.measure_alone(CASE)
    assert row.case == CASE
    assert "died" in row.why_not
    assert row.train_images_per_s is None
