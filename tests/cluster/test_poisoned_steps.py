"""A loss that is not a number: the step leaves no trace at any ZeRO stage; repeated, it ends the training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from ranks import run_ranks

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.loader import BatchPlan, Loader
from data_shards.manifest import open_dataset
from data_shards.store import open_store

RANK = Path(__file__).parent / "poisoned_rank.py"
FORMS = [
    (0, "whole", 1),
    (0, "flat", 1),
    (0, "whole", 2),
    (0, "flat", 2),
    (1, "whole", 2),
    (2, "flat", 2),
    (3, "whole", 2),
]
IDS = [f"zero-{stage} {form} {ranks}" for stage, form, ranks in FORMS]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    out = open_store(str(tmp_path_factory.mktemp("store"))).at("datasets/phantoms/default")
    convert(DataConfig(phantoms=PhantomConfig(num_patients=80, images_per_patient=2, side=32)), out)
    return out.uri


def poisoned(dataset: str, out: Path, stage: int, form: str, ranks: int, steps: str, *stop: str) -> dict:
    """What rank 0 found where the last rank met losses that are not numbers in these steps; it may `stop` early."""
    return run_ranks(RANK, ranks, dataset, str(out), str(stage), form, steps, str(ranks - 1), *stop)


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory) -> dict:
    return poisoned(dataset, tmp_path_factory.mktemp("alone"), 0, "whole", 1, "3,5")


@pytest.mark.parametrize(("stage", "form", "ranks"), FORMS[1:], ids=IDS[1:])
def test_a_poisoned_step_is_skipped_at_each_stage_by_all_ranks(dataset, alone, tmp_path, stage, form, ranks):
    found = poisoned(dataset, tmp_path, stage, form, ranks, "3,5")
    assert found["error"] == ""
    for here, there in zip(found["losses"][:6], alone["losses"][:6], strict=True):
        assert here == pytest.approx(there, rel=1e-5, nan_ok=True)
    assert found["metrics"][0]["skipped_steps"] == 2
    assert found["adam_step"] == alone["adam_step"]
    assert all(map(math.isfinite, (value for values in found["buffers"].values() for value in values)))


def test_a_poisoned_step_is_counted_and_statistics_stay_finite(alone):
    steps = len(alone["losses"])
    assert [n for n, loss in enumerate(alone["losses"], 1) if math.isnan(loss)] == [3, 5]
    assert alone["adam_step"] == [steps - 2]
    assert all(map(math.isfinite, (value for values in alone["buffers"].values() for value in values)))
    assert [said.partition(":")[0] for said in alone["said"]] == ["step 3 skipped", "step 5 skipped"]
    assert alone["metrics"][0]["skipped_steps"] == 2
    assert "skipped_steps" not in alone["metrics"][1]
    assert math.isfinite(alone["metrics"][0]["train_loss"])


def test_five_poisoned_steps_end_the_training_with_their_samples(dataset, tmp_path):
    found = poisoned(dataset, tmp_path, 0, "whole", 2, "2,3,4,5,6")
    assert found["error"].startswith("5 steps in a row, up to step 6, had non-finite gradients")
    data = open_dataset(dataset)
    epoch = Loader(data).epoch(BatchPlan("train", 16, 32, train=True, micro_batch=4))
    keys = data.index("train").key[epoch.order[5 * 16 : 6 * 16]]
    assert f"Step 6 used the samples {' '.join(keys)}; no checkpoint has been written yet. " in found["error"]
    assert "Lower train.optim.lr" in found["error"]


def test_an_end_in_epoch_two_names_the_last_good_checkpoint(dataset, tmp_path):
    steps = len(Loader(open_dataset(dataset)).epoch(BatchPlan("train", 16, 32, train=True)))
    found = poisoned(dataset, tmp_path, 0, "flat", 1, ",".join(str(steps + n) for n in range(1, steps + 1)))
    assert f"; the last good checkpoint is step-{steps:010d}. Lower train.optim.lr" in found["error"]
    assert (tmp_path / f"checkpoints/step-{steps:010d}/train.json").is_file()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_before_the_first_applied_step_resumes(dataset, tmp_path, stage):
    begun = poisoned(dataset, tmp_path, stage, "whole", 1, "1,2", "2")
    assert begun["error"] == ""
    resumed = poisoned(dataset, tmp_path, 0, "whole", 1, "99")
    assert [math.isnan(loss) for loss in resumed["losses"][:4]] == [True, True, False, False]
    assert resumed["metrics"][0]["skipped_steps"] == 2
    assert resumed["adam_step"] == [len(resumed["losses"]) - 2]
