"""A profile of a real training: what it says, and that the training is the same with and without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from ranks import run_ranks

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store

RANK = Path(__file__).parent / "profiled_rank.py"
BATCH_SIZE, STEPS = 4, 32  # of an epoch
FIRST, ACTIVE = 21, 5  # the steps of it that are profiled


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    out = open_store(str(tmp_path_factory.mktemp("store"))).at("datasets/phantoms/default")
    convert(DataConfig(phantoms=PhantomConfig(num_patients=100, images_per_patient=2, side=32)), out)
    return out.uri


def test_profiling_keeps_the_weights_and_takes_the_right_steps(dataset, tmp_path):
    plain = run_ranks(RANK, 1, dataset, str(BATCH_SIZE))
    profiled = run_ranks(RANK, 1, dataset, str(BATCH_SIZE), str(tmp_path))
    assert len(plain["losses"]) == 2 * STEPS
    assert plain["profile"] == {}
    assert (profiled["losses"], profiled["weights"]) == (plain["losses"], plain["weights"])
    check_summary(profiled["profile"])
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("ProfilerStep#") for name in names) == ACTIVE
    assert names.count("medmamba: waiting for data") == ACTIVE * BATCH_SIZE // 2  # one a micro-batch
    check_figures(plain)


def check_summary(profile: dict) -> None:
    assert (profile["device"], profile["first_step"], profile["steps"]) == ("cpu", FIRST, ACTIVE)
    shares = [profile[f"{name}_share"] for name in ("busy", "data", "host")]
    assert all(0 < share < 1 for share in shares)
    assert sum(shares) == pytest.approx(1)
    times = [row["ms"] for row in profile["largest"]]
    assert len(times) == 10
    assert times == sorted(times, reverse=True)
    assert sum(times) < profile["step_ms"]
    names = {row["name"] for row in profile["largest"]}
    assert any("ss2d_scan" in name for name in names), names
    assert not any("Profiler" in name or "waiting" in name or "Optimizer" in name for name in names)


def check_figures(kept: dict) -> None:
    one, two = kept["epochs"]
    assert "checkpoint_s" not in one
    assert two["checkpoint_s"] > 0
    for epoch in (one, two):
        assert epoch["images_per_s"] == pytest.approx(1e3 * BATCH_SIZE / epoch["step_ms"])
        assert 0 < epoch["data_wait_share"] < 1
        assert epoch["validation_s"] > 0
        assert not {"mfu", "gpu_utilization", "gpu_memory_gib"} & epoch.keys()
    usage = kept["usage"]
    assert (usage["images"], usage["steady_images"]) == (2 * STEPS * BATCH_SIZE, STEPS * BATCH_SIZE)
    assert usage["steady_s"] == pytest.approx(two["step_ms"] * STEPS / 1e3)
    assert usage["wall_s"] > usage["steady_s"] + usage["validation_s"] + usage["checkpoint_s"]
    assert all(speed > 0 and 0 <= wait < 1 for speed, wait, _ in kept["speeds"][1:])
    assert kept["speeds"][-1][-1] == 0
    timed = {"step_ms", "validation_s", "checkpoint_s", "data_wait_share", "images_per_s_last"}
    assert not any(timed & epoch.keys() for epoch in kept["history"])
