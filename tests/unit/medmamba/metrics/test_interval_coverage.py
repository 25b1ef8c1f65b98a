"""The long matrix: coverage of all intervals, a part of what tests/bench/interval_coverage.py simulates."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clustered_sets import draw, strength_of, true_figures

from medmamba.metrics.estimates import estimate
from medmamba.metrics.figures import FIGURES

BENCH = Path(__file__).resolve().parents[3] / "bench" / "interval_coverage.py"


@pytest.mark.slow
@pytest.mark.parametrize("auc", [0.88, 0.99])
@pytest.mark.parametrize(("images", "groups"), [(156, 30), (624, 30), (156, 104)])
def test_intervals_cover_the_truth_in_92_percent_of_sets(images, groups, auc):
    """400 sets: two standard errors, 2.4 points, are granted below 92 %."""
    truth, strength = true_figures(2, auc), strength_of(2, auc)
    sets = [estimate(draw(np.random.default_rng(seed), images, groups, 2, strength)) for seed in range(400)]
    for name in FIGURES:
        for true, rows in ((truth.macro, [s.macro for s in sets]), (truth.classes[1], [s.classes[1] for s in sets])):
            held = [row[name].low <= true[name] <= row[name].high for row in rows if row[name].low is not None]
            assert np.mean(held) >= 0.896, name


@pytest.mark.slow
def test_the_table_of_coverages_has_80_columns():
    command = [sys.executable, str(BENCH), "--sets", "4", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "4 sets each" in done.stdout, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
