"""What `medmamba bench` measures: rows that cannot be measured say why."""

import os

import pytest
import torch

from medmamba.ops.ss2d_scan import cuda
from pipelines.bench import measure as bench

CASE = bench.Case("nano", 1, 64, "float32", "cuda", "cuda", compiled=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the case would be measured")
def test_a_gpu_row_is_measured_elsewhere_and_returns_its_reason():
    row = bench.measure_alone(CASE)
    assert row.case == CASE
    assert row.why_not == "backend cuda: torch finds no CUDA device"


def die(case, *, repeats):
    os._exit(9)


def test_a_row_whose_process_dies_says_so(monkeypatch):
    monkeypatch.setattr(bench, "measure", die)
    row = bench.measure_alone(CASE)
    assert row.case == CASE
    assert "died" in row.why_not
    assert row.train_images_per_s is None


def test_a_row_that_torch_refuses_says_why():
    # One image of 48 px leaves one position in the last stage: BatchNorm has no statistics of one value.
    row = bench.measure(bench.Case("nano", 1, 48, "float32", "numba", "cpu", compiled=False), repeats=1)
    assert row.why_not.startswith("ValueError: Expected more than 1 value per channel when training")


@pytest.mark.parametrize("precision", list(bench.TOLERANCE))
def test_the_check_before_a_speed_reads_rows_like_the_network(precision):
    u, dt, b, c, *_ = bench._operands("cpu", getattr(torch, precision))
    assert cuda._aligned(u, b, c)
    assert cuda._rows(dt) is dt
