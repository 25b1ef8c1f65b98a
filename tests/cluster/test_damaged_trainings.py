"""Every damage to every file of the newest checkpoint: the one before is taken, aloud, to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from damaged_trainings import DAMAGES
from ranks import run_ranks

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store
from pipelines.worker.checkpoint.stored import FILES, STATE

SCRIPT = Path(__file__).with_name("damaged_trainings.py")
PICKLES = [f"plant_pickle {file}" for file in FILES]
CASES = [f"{damage.__name__} {file}" for damage in DAMAGES for file in (*FILES, STATE)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What each of the trainings said and how it ended."""
    data = open_store(str(tmp_path_factory.mktemp("data")))
    convert(DataConfig(phantoms=PhantomConfig(num_patients=30, images_per_patient=2, side=32)), data)
    return run_ranks(SCRIPT, 1, data.uri, str(tmp_path_factory.mktemp("trainings")))


@pytest.mark.parametrize("case", [case for case in CASES if case not in PICKLES])
def test_the_checkpoint_before_is_taken_to_the_same_weights(found, case):
    # Without the file that makes it valid it is an upload that a kill cut off, of which nothing was lost.
    told = [] if case == f"unlink {STATE}" else ["checkpoint step-0000000006 is damaged"]
    assert [line.partition(" (")[0] for line in found[case]["said"]] == told
    assert found[case]["first"] == 5, "it resumes after the step of the checkpoint before"
    assert found[case]["equal"]


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_under_a_corrected_digest_is_not_run(found, case):
    assert found[case]["ran"] == []
    _, file = case.split()
    assert file in found[case].get("refused", file), "an error names the file"


def test_a_first_format_checkpoint_resumes_to_the_same_weights(found):
    assert found["first format"]["first"] == 5
    assert found["first format"]["equal"]


def test_a_first_format_pickle_with_a_fixed_digest_is_refused(found):
    assert found["planted in the first format"]["ran"] == []
    assert "that could run code when loaded" in found["planted in the first format"]["refused"]
