"""What `medmamba bench` measures: rows that cannot be measured say why, costs are those that torch counts."""

import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medmamba.config import MedMambaConfig
from medmamba.model import build_model
from medmamba.ops.ss2d_scan import cuda
from pipelines.bench import measure as bench

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


def test_a_row_that_torch_refuses_says_why():
    # One image of 48 px leaves one position in the last stage: BatchNorm has no statistics of one value.
    row = bench.measure(bench.Case("nano", 1, 48, "float32", "numba", "cpu", compiled=False), repeats=1)
    assert row.why_not.startswith("ValueError: Expected more than 1 value per channel when training")


@pytest.mark.parametrize("side", [32, 44])
def test_multiply_accumulates_are_those_that_torch_counts_and_the_state_updates(side):
    config = MedMambaConfig(variant="nano", num_classes=bench.NUM_CLASSES)
    model = build_model(config, scan="reference").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(torch.randn(1, 3, side, side))
    # The definition's read-out is a product, which torch counts; its updates of the states are elementwise.
    assert bench.macs(config, side) == counted.get_total_flops() // 2 + bench.scan_updates(config, side)


def test_the_published_variants_scan_what_their_shapes_say():
    updates = {name: bench.scan_updates(MedMambaConfig(variant=name, num_classes=6), 224) for name in ("T", "S", "B")}
    assert {name: round(number / 1e6, 1) for name, number in updates.items()} == {"T": 81.9, "S": 101.2, "B": 160.6}


@pytest.mark.parametrize("precision", list(bench.TOLERANCE))
def test_the_check_before_a_speed_reads_rows_as_the_timed_network_does(precision):
    u, dt, b, c, *_ = bench._operands("cpu", getattr(torch, precision))
    assert cuda._aligned(u, b, c)
    assert cuda._rows(dt) is dt
