"""Every recipe, dry-run on a Ray that was started with one to eight GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ray_cluster

from data_shards.catalog import card
from pipelines.recipes import RECIPES
from pipelines.workflows import WORKFLOWS

SCRIPT = Path(__file__).parent / "dry_runs.py"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("num_gpus", range(1, 9))
def test_every_recipe_has_a_placement_on_a_ray_of_so_many_gpus(num_gpus, tmp_path):
    token = tmp_path / "token"
    token.write_text("0" * 64)
    for label in card("kvasir").classes:  # the one recipe whose images are in folders of classes
        (tmp_path / "images" / label).mkdir(parents=True)
        (tmp_path / "images" / label / "1.jpg").touch()
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
    resources = ["--num-cpus=16", f"--num-gpus={num_gpus}"]
    with ray_cluster(env, log=tmp_path / "ray.log", resources=resources) as head:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "images"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_ADDRESS": head.address, **env},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert set(results) == {f"{name} {workflow}" for name in RECIPES for workflow in WORKFLOWS}
    for name, result in results.items():
        placement, recipe = result["placement"], result["recipe"]
        assert (placement["device"], placement["concurrent_trials"], placement["scan"]) == ("cuda", num_gpus, "auto"), (
            name
        )
        searched = recipe["tune"]["space"]["batch_size"] if name.endswith("release") else []
        for size in searched or [recipe["train"]["batch_size"]]:
            assert size % (recipe["train"]["micro_batch"] * placement["workers"]) == 0, name
        assert len(result["notes"]) == (placement["workers"] < num_gpus), name
        assert result["placed_on"] == f"the Ray at {head.address}"
