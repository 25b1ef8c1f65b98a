"""Trials are read as "trial 3/8"; their ids are what their runs and checkpoints are found by."""

from pipelines.sweep.ledger import trial_name


def test_a_trial_has_a_number_or_in_old_records_its_id():
    assert trial_name(3, 8, "2ad399ca") == "trial 3/8"
    assert trial_name(0, 8, "2ad399ca") == "trial 2ad399ca"
