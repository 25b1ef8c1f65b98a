"""Trainings from weights under the real engine: lower losses at once, frozen tensors bit-equal, resumable."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest
from ranks import run_ranks

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store

SCRIPT = Path(__file__).parent / "finetuned_rank.py"


@pytest.mark.parametrize(
    "options",
    [("0",), ("0", "flat"), *(pytest.param((stage,), marks=pytest.mark.slow) for stage in ("1", "3"))],
    ids=" ".join,
)
def test_a_finetuning_starts_lower_keeps_frozen_and_resumes(tmp_path, options):
    out = open_store(str(tmp_path / "data"))
    convert(DataConfig(phantoms=PhantomConfig(num_patients=90, images_per_patient=2, side=32)), out)
    seen = run_ranks(SCRIPT, 1, out.uri, str(tmp_path), *options)
    epoch = len(seen["scratch"]) // 2
    first = {name: mean(seen[name][:epoch]) for name in ("tuned", "upstream", "scratch")}
    assert first["tuned"] < first["upstream"] < 0.8 * first["scratch"]  # the upstream checkpoint's head is new
    frozen = re.compile(r"patch_embed\.|layers\.0\.")
    assert seen["tuned moved"]
    assert not any(frozen.match(name) for name in seen["tuned moved"])
    assert {name.split(".")[1] for name in seen["tuned moved"] if name.startswith("layers.")} == {"1", "2", "3"}
    assert {"head.weight", "head.bias"} <= set(seen["tuned moved"])
    assert any(name.endswith("running_mean") for name in seen["tuned moved"])
    assert seen["slow layers"]["layers.3."] < 1e-6 < 1e-4 < seen["slow layers"]["head."]  # at a millionth of the rate
    assert set(seen["probe moved"]) == {"head.weight", "head.bias"}
    assert seen["resumed moved"] == []
