"""How the end-to-end tests call the command line: as a person would, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Small enough for seconds, whole enough for every step: three classes in every split, two trials, two epochs.
TINY = [
    "--recipe", "quickstart", "--data.phantoms.num-patients", "30", "--data.phantoms.images-per-patient", "2",
    "--data.phantoms.side", "32", "--data.samples-per-shard", "20", "--train.image-size", "32", "--train.epochs", "2",
    "--train.batch-size", "8", "--train.micro-batch", "4", "--tune.trials", "2", "--tune.epochs", "1",
    "--tune.space.batch-size", "8", "16", "--evaluate.baseline-side", "16",
    "--gate.no-beats-baseline",  # two epochs need not be better than a logistic regression
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    """The command line of one call."""
    return [sys.executable, "-m", "pipelines", *arguments]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what names another test's services."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MEDMAMBA_STORE")}
    return {**kept, **(extra or {})}


def medmamba(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path, code: int | None = 0, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end; fails with all it printed where the exit code is another (None: any will do)."""
    done = subprocess.run(
        command(*arguments), env=environment(env), cwd=cwd, capture_output=True, text=True, timeout=timeout_s
    )
    assert code is None or done.returncode == code, (
        f"exit code {done.returncode} instead of {code}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    )
    return done
