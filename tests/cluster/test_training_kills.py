"""Some kills in the middle of trainings (training_kills.py has them all): the same weights in the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
import training_kills as kills

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def place(folder):
    with kills.in_folder(folder) as opened:
        yield opened


@pytest.mark.parametrize(
    ("who", "phase"),
    [("worker", "checkpoint"), ("driver", "epoch"), ("all", "validation")],
    ids=["worker", "driver", "all"],
)
def test_a_training_killed_in_a_phase_ends_with_the_weights_of_an_undisturbed_one(folder, place, who, phase):
    digest = kills.run_undisturbed(folder, place, stage=1)
    outcome = kills.run_case(folder, place, kills.Case(1, who, phase), digest)
    assert outcome.was_in_phase, outcome
    assert outcome.is_good, outcome
    # At most the epoch since the last checkpoint that is complete, of four steps, and the one of which this was one.
    assert outcome.steps_again <= 8, outcome
