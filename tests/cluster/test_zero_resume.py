"""Two ranks resume from what both of them saved, also where the weights themselves are cut in two (ZeRO 3)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "form"), [("3", "whole"), ("0", "flat"), ("1", "flat"), ("2", "flat")])
def test_two_ranks_resume_to_the_same_numbers(zero_stage, form, tmp_path):
    out = open_store(str(tmp_path / "data"))
    convert(DataConfig(phantoms=PhantomConfig(num_patients=24, images_per_patient=2, side=32)), out)
    script = Path(__file__).parent / "resumed_rank.py"
    whole = run_ranks(script, 2, out.uri, zero_stage, form, str(tmp_path / "whole"))

    merged = tmp_path / "checkpoint"
    for share in ("0", "1"):
        shutil.copytree(tmp_path / "whole/1" / share, merged, dirs_exist_ok=True)
    files = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()}
    described = json.loads((merged / "train.json").read_text())
    assert set(described["digests"]) == files - {"train.json"}
    if zero_stage != "0":
        assert len([name for name in files if "optim_states" in name]) == 2

    assert run_ranks(script, 2, out.uri, zero_stage, form, str(tmp_path / "resumed"), str(merged)) == whole
