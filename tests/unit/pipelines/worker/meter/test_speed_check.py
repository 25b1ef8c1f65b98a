"""When a training is called slow, what it is compared with, and what it says is the reason."""

import re

import pytest

from medmamba.config import ConvNetConfig, MedMambaConfig
from pipelines.bench.measure import Case, Row
from pipelines.placement import Placement
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.meter.bench_rows import MEASURED, BenchSpeed, find_reference, read_remembered, remember
from pipelines.worker.meter.speed_check import SpeedCheck, slow_reason, speed_check

H200 = "NVIDIA H200"
ALONE = Placement(
    workers=1, device="cuda", cpus_per_worker=8, zero_stage=0, scan="cuda", concurrent_trials=1, nodes=1, compile="on"
)
REFERENCE = BenchSpeed(H200, "T", 224, "bfloat16", 32, 2000.0)
FAST = {"epoch": 1, "step": 300, "images_per_s_last": 1900.0, "data_wait_share_last": 0.0, "gpu_utilization": 0.99}
SLOW = {**FAST, "images_per_s_last": 999.0}


@pytest.mark.parametrize(
    ("figures", "changes", "micro_batch", "told"),
    [
        ({"data_wait_share_last": 0.34}, {}, 128, r"waits for data 34 % .*--placement\.cpus-per-worker, now 8"),
        ({"data_wait_share_last": 0.34}, {"zero_stage": 3, "compile": "off"}, 32, "waits for data"),
        ({"gpu_utilization": 0.27}, {"compile": "off"}, 32, "not compiled"),
        ({"gpu_utilization": 0.27}, {}, 32, r"keep the GPU busy \(27 %\) with micro-batches of 32"),
        ({"gpu_utilization": 0.27}, {"zero_stage": 1}, 128, r"ZeRO stage 1 .*--placement\.zero-stage 0"),
        ({}, {"zero_stage": 2}, 32, "ZeRO stage 2"),
        ({}, {}, 128, r"medmamba train --profile with another --run NAME"),
    ],
    ids=["data", "data first", "not compiled", "host", "zero", "zero of a busy GPU", "unknown"],
)
def test_the_reason_follows_from_the_figures(figures, changes, micro_batch, told):
    placement = ALONE.model_copy(update=changes)
    check = SpeedCheck(REFERENCE, placement, micro_batch)
    warning = check({**SLOW, **figures})
    assert warning.startswith("slow: 999 images/s, but T at 224 px reaches 2,000 on this GPU: ")
    assert re.search(told, warning)
    assert check({**SLOW, **figures, "epoch": 2}) == "", "it is said once"


def test_without_nvml_the_host_is_not_blamed():
    figures = {name: value for name, value in SLOW.items() if name != "gpu_utilization"}
    assert "--profile" in slow_reason(figures, ALONE, 32)


def test_half_of_the_bench_is_enough_and_every_worker_counts():
    assert SpeedCheck(REFERENCE, ALONE, 32)({**SLOW, "images_per_s_last": 1000.0}) == ""
    two = ALONE.model_copy(update={"workers": 2})
    assert "reaches 4,000 on 2 such GPUs" in SpeedCheck(REFERENCE, two, 32)(FAST)


def test_a_short_first_epoch_is_not_judged_for_its_start_up():
    for before in (0, 3):  # of a process that resumes it is the first too
        check = SpeedCheck(REFERENCE, ALONE, 32)
        assert check({**SLOW, "step": 39 * (before + 1), "epoch": before + 1}) == ""
        assert check({**SLOW, "step": 39 * (before + 2), "epoch": before + 2}).startswith("slow: ")


def test_a_fast_or_unreferenced_training_is_not_judged():
    check = SpeedCheck(REFERENCE, ALONE, 32)
    assert (check(FAST), check({**SLOW, "epoch": 2})) == ("", "")
    assert SpeedCheck(None, ALONE, 32)(SLOW) == ""


@pytest.mark.parametrize(
    ("network", "side", "micro_batch", "expected"),
    [
        ("T", 224, 128, 3131),
        ("T", 224, 200, 3131),
        ("T", 224, 64, 2243),
        ("T", 224, 16, None),
        ("T", 112, 32, 4 * 2243),
        ("T", 448, 128, 3131 / 4),
        ("T", 64, 128, None),
        ("S", 224, 128, 2503),
        ("B", 224, 32, None),
        ("nano", 224, 128, None),
    ],
)
def test_the_table_scales_by_pixels_not_by_images_per_step(network, side, micro_batch, expected):
    found = find_reference(H200, network, side=side, precision="bfloat16", micro_batch=micro_batch)
    assert (found and found.images_per_s) == (expected and pytest.approx(expected))
    assert find_reference("NVIDIA L4", network, side=side, precision="bfloat16", micro_batch=micro_batch) is None
    assert find_reference(H200, network, side=side, precision="float32", micro_batch=micro_batch) is None


def test_measured_speed_counts_before_a_table_less_near():
    mine = [BenchSpeed(H200, "T", 224, "bfloat16", 128, speed) for speed in (2800.0, 2900.0)]
    far = [BenchSpeed(H200, "T", 192, "bfloat16", 128, 5000.0)]
    for remembered, expected in [(mine, 2900.0), (far, 3131)]:
        found = find_reference(H200, "T", side=224, precision="bfloat16", micro_batch=128, remembered=remembered)
        assert found is not None
        assert found.images_per_s == expected


def test_compiled_rows_of_a_gpu_are_remembered_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_remembered() == []
    case = Case("S", 32, 112, "float32", "cuda", "cuda", True)
    remember(Row(case, train_images_per_s=7.5), "NVIDIA L4")
    remember(Row(case, why_not="out of memory"), "NVIDIA L4")
    for field in ({"compiled": False}, {"device": "cpu"}):
        remember(Row(Case(**{**case.__dict__, **field}), train_images_per_s=7.5), "NVIDIA L4")
    with (tmp_path / "medmamba/bench.jsonl").open("a") as file:
        file.write('{"gpu": "torn\n[]\n')
    remember(Row(case, train_images_per_s=8.5), "NVIDIA L4")
    speeds = [BenchSpeed("NVIDIA L4", "S", 112, "float32", 32, speed) for speed in (7.5, 8.5)]
    assert read_remembered() == speeds


def test_a_home_that_cannot_be_written_to_only_forgets(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember(Row(Case("S", 32, 112, "float32", "cuda", "cuda", True), train_images_per_s=7.5), "NVIDIA L4")
    assert read_remembered() == []


def test_the_speed_check_is_silent_on_cpu_and_other_networks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train = TrainConfig(batch_size=128, micro_batch=128, image_size=224, precision="bfloat16")
    config = TrainStepConfig(model=MedMambaConfig(variant="T"), train=train)
    assert speed_check(config, ALONE, H200).reference == MEASURED[0]
    assert speed_check(config, ALONE, "").reference is None
    assert speed_check(config.model_copy(update={"model": ConvNetConfig()}), ALONE, H200).reference is None
