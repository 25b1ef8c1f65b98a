"""Dry-runs every recipe in every workflow on the Ray of RAY_ADDRESS: `dry_runs.py FILE` prints all results as JSON.

FILE stands for the images of those that need some. One process for all: each would have to connect to Ray again.
"""

import contextlib
import io
import json
import sys

from pipelines.cli import main
from pipelines.recipes import RECIPES
from pipelines.workflows import WORKFLOWS


def dry_run(recipe: str, workflow: str, *words: str) -> dict:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["run", workflow, "--recipe", recipe, "--dry-run", "--json", *words]) == 0
    return json.loads(out.getvalue())


if __name__ == "__main__":
    results = {}
    for recipe, made in RECIPES.items():
        source = [] if made().data.dataset == "phantoms" else ["--data.source", sys.argv[1]]
        for workflow in WORKFLOWS:
            results[f"{recipe} {workflow}"] = dry_run(recipe, workflow, *source)
    print(json.dumps(results))
