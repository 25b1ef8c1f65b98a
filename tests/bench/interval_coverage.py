"""How often the 95 % intervals of all figures hold the truth, on simulated sets of clustered images.

    python tests/bench/interval_coverage.py [--sets 1000] [--jobs 2] [--json FILE]

Prints, for every figure of all classes and of the rarest class, coverage in percent and mean width; then the same of
differences between two equally good models whose noise has a correlation of 0.5, with how often `p_above(0)` is below
0.05. An asterisk marks coverage below 93 % (30 groups, and differences: 92 %); with one, the exit code is 1. The seeds
are fixed.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clustered_sets import draw, draw_models, strength_of, true_figures

from medmamba.metrics.estimates import compare, estimate
from medmamba.metrics.figures import FIGURES

SIZES = ((156, 30), (156, 104), (624, 30), (624, 416))  # images, groups
AUCS = (0.88, 0.99)
CORRELATION = 0.5
Cell = tuple[bool, float, bool]  # the interval holds the truth, its width, p_above(0) < 0.05


def main() -> int:
    """Simulates on several processes and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for classes in (2, 3):
            for auc in AUCS:
                true_figures(classes, auc)  # before the processes are forked, so that they share it
        for classes in (2, 3):
            for auc in AUCS:
                conditions = [(classes, auc, *size) for size in SIZES]
                measured = {each: gather(pool, single, each, options.sets, options.jobs) for each in conditions}
                paired = {each: gather(pool, pair, each, options.sets, options.jobs) for each in conditions}
                results += show(f"{classes} classes, AUC {auc}", measured)
                results += show(f"{classes} classes, AUC {auc}, difference of two equal models", paired, level=True)
    low = [each for each in results if each["coverage"] < least(each["groups"], "level" in each)]
    print(f"\n{options.sets} sets each; {len(low)} of {len(results)} coverages below the bound")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return int(bool(low))


def least(groups: int, difference: bool) -> float:
    """The coverage in percent that is asked for."""
    return 92.0 if groups == 30 or difference else 93.0


def gather(pool: ProcessPoolExecutor, simulate, condition: tuple, sets: int, jobs: int) -> dict[str, list[Cell]]:
    """Row of the table -> what each set gave."""
    parts = pool.map(simulate, [condition] * jobs, [range(at, sets, jobs) for at in range(jobs)])
    gathered: dict[str, list[Cell]] = {}
    for part in parts:
        for row, cells in part.items():
            gathered.setdefault(row, []).extend(cells)
    return gathered


def single(condition: tuple[int, float, int, int], seeds: range) -> dict[str, list[Cell]]:
    """Intervals of figures. A figure that a set does not define counts neither way."""
    classes, auc, images, groups = condition
    truth, strength = true_figures(classes, auc), strength_of(classes, auc)
    rows: dict[str, list[Cell]] = {}
    for seed in seeds:
        found = estimate(draw(generator(condition, seed), images, groups, classes, strength))
        for where, got, true in (("all", found.macro, truth.macro), ("rarest", found.classes[-1], truth.classes[-1])):
            for name in FIGURES:
                each = got[name]
                if each.low is not None:
                    rows.setdefault(f"{where} {name}", []).append(
                        (each.low <= true[name] <= each.high, each.high - each.low, False)
                    )
    return rows


def pair(condition: tuple[int, float, int, int], seeds: range) -> dict[str, list[Cell]]:
    """Intervals of differences whose truth is 0."""
    classes, auc, images, groups = condition
    strength = strength_of(classes, auc)
    rows: dict[str, list[Cell]] = {}
    for seed in seeds:
        models = draw_models(generator(condition, seed), images, groups, classes, (strength, strength), CORRELATION)
        for name, each in compare(*models).macro.items():
            p = each.p_above(0.0)
            if each.low is not None and p is not None:
                rows.setdefault(f"all {name}", []).append((each.low <= 0 <= each.high, each.high - each.low, p < 0.05))
    return rows


def generator(condition: tuple[int, float, int, int], seed: int) -> np.random.Generator:
    """The random numbers of one set."""
    classes, auc, images, groups = condition
    return np.random.default_rng([seed, classes, round(auc * 100), images, groups])


def show(title: str, measured: dict[tuple, dict[str, list[Cell]]], *, level: bool = False) -> list[dict]:
    """Prints one table of 80 columns and returns its cells."""
    print(f"\n{title}\n{'images / groups':<24}" + "".join(f"{f'{each[2]}/{each[3]}':>14}" for each in measured))
    results = []
    for row in next(iter(measured.values())):
        line = f"{row.replace('average_precision', 'avg_precision'):<24}"
        for condition, rows in measured.items():
            held, widths, below = (np.mean(each) for each in zip(*rows[row], strict=True))
            coverage = 100 * float(held)
            mark = "*" if coverage < least(condition[3], level) else " "
            results.append({"table": title, "row": row, "images": condition[2], "groups": condition[3]})
            results[-1] |= {"coverage": coverage, "width": float(widths)}
            line += f"{coverage:>8.1f}{mark}{(f'{100 * below:5.1f}' if level else f'{widths:5.3f}')}"
            if level:
                results[-1]["level"] = 100 * float(below)
        print(line, flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
