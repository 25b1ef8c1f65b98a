"""A training goes on with other numbers of workers and other ZeRO stages, from the same weights and moments."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import Store, open_store

SCRIPT = Path(__file__).parent / "portable_rank.py"
STEPS = 6  # of each world


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Store:
    out = open_store(str(tmp_path_factory.mktemp("data")))
    convert(DataConfig(phantoms=PhantomConfig(num_patients=400, images_per_patient=6, side=64)), out)
    return out


def losses(dataset: Store, out: Path, worlds: list[tuple[int, str, str]]) -> list[float]:
    """The losses of six steps in each of these worlds (workers, ZeRO stage, flat or whole), one after another."""
    found: list[float] = []
    for workers, stage, form in worlds:
        seen = run_ranks(SCRIPT, workers, dataset.uri, str(out), stage, form, str(len(found) + STEPS))
        assert seen["restored"], "weights or moments differ from those that were saved"
        found += seen["losses"]
    return found


def test_other_workers_and_stage_resume_with_the_same_numbers(dataset, tmp_path):
    whole = losses(dataset, tmp_path / "whole", [(1, "0", "whole"), (1, "0", "whole")])
    moved = losses(dataset, tmp_path / "moved", [(2, "1", "flat"), (1, "0", "whole")])
    assert len(whole) == len(moved) == 2 * STEPS
    assert moved[:STEPS] == pytest.approx(whole[:STEPS], rel=1e-5)
    assert moved == pytest.approx(whole, rel=5e-3)


WORLDS = {
    "ranks": [(2, "0", "whole"), (1, "0", "whole"), (3, "0", "whole"), (2, "0", "whole")],
    "stages": [(2, "0", "whole"), (2, "1", "whole"), (2, "2", "whole"), (2, "3", "whole"), (2, "0", "whole")],
    "both": [(2, "1", "whole"), (1, "0", "flat"), (3, "2", "flat"), (2, "3", "whole"), (1, "1", "flat")],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WORLDS)
def test_a_training_moves_through_many_worlds(name, dataset, tmp_path):
    worlds = WORLDS[name]
    moved = losses(dataset, tmp_path / "moved", worlds)
    whole = losses(dataset, tmp_path / "whole", [worlds[0]] * len(worlds))
    assert moved[:STEPS] == whole[:STEPS]
    assert moved[: 2 * STEPS] == pytest.approx(whole[: 2 * STEPS], rel=1e-5)
    # Other ranks and stages add up in another order, which a network that learns amplifies.
    assert moved == pytest.approx(whole, rel=5e-3)
