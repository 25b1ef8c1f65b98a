"""A training that resumes in the middle of an epoch, in the same world, makes the steps that it would have made."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store

SCRIPT = Path(__file__).parent / "portable_rank.py"


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "form"),
    [
        (1, "0", "whole"),
        *(
            pytest.param(2, stage, form, marks=pytest.mark.slow)
            for stage, form in [("3", "whole"), ("0", "flat"), ("1", "flat"), ("2", "flat"), ("1", "whole")]
        ),
    ],
)
def test_a_resumed_training_has_the_same_numbers(ranks, zero_stage, form, tmp_path):
    out = open_store(str(tmp_path / "data"))
    convert(DataConfig(phantoms=PhantomConfig(num_patients=150, images_per_patient=3, side=64)), out)
    whole = run_ranks(SCRIPT, ranks, out.uri, str(tmp_path / "whole"), zero_stage, form, "5")["losses"]
    resumed: list[float] = []
    for stop in ("2", "5"):
        seen = run_ranks(SCRIPT, ranks, out.uri, str(tmp_path / "resumed"), zero_stage, form, stop)
        assert seen["restored"], "weights or moments differ from those that were saved"
        resumed += seen["losses"]
    assert resumed == whole
