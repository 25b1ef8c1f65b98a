"""A training that is ended early ends at a checkpoint of all ranks, wherever it is, and resumes to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import Store, open_store
from pipelines.cluster.monitor import INTERRUPTED

RANK = Path(__file__).parent / "stopped_rank.py"
STAGE = "3"  # every rank holds a part of each weight
WEIGHTS = ("weights.safetensors", "moments.safetensors")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Store:
    out = open_store(str(tmp_path_factory.mktemp("data")))
    convert(DataConfig(phantoms=PhantomConfig(num_patients=80, images_per_patient=1, side=32), val_fraction=0.4), out)
    return out


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> dict:
    return run_ranks(RANK, 2, dataset.uri, str(tmp_path_factory.mktemp("whole")), STAGE, "never")


def test_a_stop_in_a_validation_is_immediate_and_loses_nothing(dataset, undisturbed, tmp_path):
    steps = undisturbed["step"] // 2
    stopped = run_ranks(RANK, 2, dataset.uri, str(tmp_path), STAGE, "validation")
    assert (stopped["ended"], stopped["step"], stopped["epoch"]) == (INTERRUPTED, steps, 0)
    assert len(stopped["losses"]) == steps
    assert stopped["batches"] <= 2 < undisturbed["batches"] // 2
    resumed = run_ranks(RANK, 2, dataset.uri, str(tmp_path), STAGE, "never")
    assert (resumed["ended"], resumed["step"], resumed["epoch"]) == ("end", undisturbed["step"], 2)
    assert [resumed["digests"][name] for name in WEIGHTS] == [undisturbed["digests"][name] for name in WEIGHTS]
    assert "images_per_s" not in resumed["history"][0], "none of its steps was made by this process"
    assert resumed["history"][1]["images_per_s"] > 0
    told = [{name: value for name, value in each.items() if name != "images_per_s"} for each in resumed["history"]]
    assert told == [
        {name: value for name, value in each.items() if name != "images_per_s"} for each in undisturbed["history"]
    ]


def test_a_checkpoint_within_a_validation_changes_nothing(dataset, undisturbed, tmp_path):
    seen = run_ranks(RANK, 2, dataset.uri, str(tmp_path), STAGE, "checkpoint")
    assert (seen["ended"], seen["batches"]) == ("end", undisturbed["batches"])
    assert [seen["digests"][name] for name in WEIGHTS] == [undisturbed["digests"][name] for name in WEIGHTS]


def test_a_failing_record_on_rank_0_stops_all_at_a_checkpoint(dataset, undisturbed, tmp_path):
    stopped = run_ranks(RANK, 2, dataset.uri, str(tmp_path), STAGE, "record")
    assert stopped["ended"] == "MLflow was away for too long"
    assert 3 <= stopped["step"] <= 5, "it failed after step 2, and the ranks are a step apart"
    resumed = run_ranks(RANK, 2, dataset.uri, str(tmp_path), STAGE, "never")
    assert [resumed["digests"][name] for name in WEIGHTS] == [undisturbed["digests"][name] for name in WEIGHTS]
