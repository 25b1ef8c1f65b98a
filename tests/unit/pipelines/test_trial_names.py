"""Trials are read as "trial 3/8"; their ids stay what a sweep is resumed by."""

import pytest

from pipelines.steps.tune import _number, trial_name

FOLDER = "/s/runs/r/tune/ray/trial_{id}_{n}_model_drop_path=0.1000,train_optim_lr=0.0020_2026-12-01_00-04-52"


@pytest.mark.parametrize(
    ("path", "trial_id", "number"),
    [
        (FOLDER.format(id="3befb4eb", n=1), "3befb4eb", 1),
        (FOLDER.format(id="c7fb88c2", n=12), "c7fb88c2", 12),
        (FOLDER.format(id="ab12_00003", n=4), "ab12_00003", 4),
        ("bucket/prefix/trial_c7fb88c2_7", "c7fb88c2", 7),
        ("/s/trial_of_something_else", "c7fb88c2", 0),
        ("", "c7fb88c2", 0),
    ],
)
def test_a_trials_number_is_that_of_its_folder_which_a_restored_sweep_keeps(path, trial_id, number):
    assert _number(path, trial_id) == number


def test_a_trial_without_a_number_keeps_its_id():
    assert trial_name(3, 8, "2ad399ca") == "trial 3/8"
    assert trial_name(0, 8, "2ad399ca") == "trial 2ad399ca"
