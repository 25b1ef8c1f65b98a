"""Real images through the whole chain, store on S3 and MLflow as a server: what the recipes reach on two CPU cores.

Slow: ten to fifteen minutes. Prints the table that the README quotes.
"""

from __future__ import annotations

import json

import pytest
from chain import medmamba

from data_shards.manifest import open_dataset
from data_shards.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
MINUTES_3 = 180.0


@pytest.fixture(scope="module")
def services(s3_server, mlflow_server):
    return {**s3_server.env, "MLFLOW_TRACKING_URI": mlflow_server, "MEDMAMBA_STORE": f"{s3_server.uri}/real"}


def release(recipe: str, source, services, cwd, *more: str) -> dict:
    """The facts of a release and the seconds its training took; a gate that says no is a result too."""
    arguments = ("run", "release", "--recipe", recipe, "--data.source", str(source), *more)
    try:
        medmamba(*arguments, env=services, cwd=cwd, timeout_s=1500)
    except AssertionError as error:
        if "exit code 3" not in str(error):
            raise
    again = medmamba_json(*arguments, services=services, cwd=cwd)
    run = more[more.index("--run") + 1] if "--run" in more else recipe
    record = json.loads(medmamba("status", run, "--json", env=services, cwd=cwd).stdout)
    assert all(row["state"] == "done" for row in record)
    seconds = {row["step"]: row["seconds"] for row in record}
    told = {"train_s": seconds["train"], **again["evaluate"]["metrics"], "baselines": again["evaluate"]["baselines"]}
    print(f"\n{run}: {json.dumps(told)}  winner {json.dumps(again['tune']['winner'])}")
    return {**again, "seconds": seconds}


def medmamba_json(*arguments: str, services, cwd) -> dict:
    """What a finished run says as JSON, whatever its gate said."""
    for code in (0, 3):
        try:
            return json.loads(medmamba(*arguments, "--json", env=services, cwd=cwd, code=code).stdout)
        except AssertionError:
            if code == 3:
                raise
    raise AssertionError("unreachable")


def test_pneumonia_on_chest_x_rays_beats_a_linear_model(shared_dir, services, tmp_path):
    facts = release("pneumoniamnist", shared_dir / "data/pneumoniamnist.npz", services, tmp_path)
    assert facts["evaluate"]["metrics"]["auc"] >= 0.95
    assert facts["evaluate"]["metrics"]["auc"] > facts["evaluate"]["baselines"]["pixels"]["auc"]
    assert facts["seconds"]["train"] < MINUTES_3


def test_breast_ultrasound_with_three_seeds(shared_dir, services, tmp_path):
    source = shared_dir / "data/breastmnist.npz"
    found = []
    for seed in ("0", "1", "2"):
        facts = release("breastmnist", source, services, tmp_path, "--train.seed", seed, "--run", f"breast-{seed}")
        found.append(facts["evaluate"]["metrics"]["auc"])
        assert facts["seconds"]["train"] < MINUTES_3
    assert min(found) >= 0.80, found


def test_blood_cells_grouped_by_smear(shared_dir, services, tmp_path, monkeypatch):
    facts = release("bccd", shared_dir / "data/bccd_cells.tar", services, tmp_path)
    for name, value in services.items():
        monkeypatch.setenv(name, value)
    data = open_dataset(open_store(services["MEDMAMBA_STORE"]).at(facts["shard"]["data"]))
    train, val, test = (set(data.index(split).group) for split in ("train", "val", "test"))
    assert train.isdisjoint(val)
    assert train.isdisjoint(test)
    assert val.isdisjoint(test)
    assert facts["evaluate"]["metrics"]["accuracy"] >= 0.985
    assert facts["evaluate"]["metrics"]["balanced_accuracy"] >= 0.97
    assert {"pixels", "size"} <= set(facts["evaluate"]["baselines"])
    assert facts["seconds"]["train"] < MINUTES_3
