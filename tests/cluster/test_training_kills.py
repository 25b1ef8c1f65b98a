"""Some kills in the middle of trainings (training_kills.py has them all): the same weights in the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
import training_kills as kills

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


CASES = [kills.Case(1, "driver", "epoch"), kills.Case(1, "all", "validation"), kills.Case(1, "worker", "checkpoint")]


def test_a_training_killed_in_three_phases_keeps_its_weights(tmp_path):
    with kills.in_folder(tmp_path) as place:
        *outcomes, ending = kills.run_chain(tmp_path, place, CASES)
    for outcome in outcomes:
        assert outcome.was_in_phase, outcome
        # At most the epoch that ran, of four steps, and the one whose checkpoint was being written.
        assert outcome.steps_again <= 8, outcome
    assert ending.is_good, ending
