"""The gate's comparison with the baselines: on the tags of two versions, without MLflow."""

from __future__ import annotations

import json

import pytest

from data_shards.store import open_store
from pipelines.flow import Step, plan_steps
from pipelines.recipes import recipe
from pipelines.steps import promote
from pipelines.steps.promote import DECISION, GateConfig, _kept, decide
from pipelines.tracking.registry import Version
from pipelines.workflows import WORKFLOWS


def version(number: int = 1, *, auc: float = 0.877, manifest: str = "m", **tags) -> Version:
    about = {"test_auc": repr(auc), "test_accuracy": "0.596", "medmamba.manifest": manifest, "medmamba.run": "r"}
    return Version("model", number, about | {name: str(value) for name, value in tags.items()}, "run")


def verdict(candidate: Version, champion: Version | None = None, **config) -> tuple[str, str]:
    found = decide(GateConfig(**config), candidate, champion)
    return found["verdict"], found["reason"]


def test_a_model_worse_than_its_baseline_is_rejected():
    told = verdict(version(baseline_pixels_auc=0.897, baseline_chance_auc=0.5))
    assert told == (
        "no",
        "test auc 0.8770 of version 1 is more than 0.01 below the baseline's 0.8970 (logistic regression, pixels; "
        "gate.beats_baseline)",
    )


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [(0.8869, "yes"), (0.887, "yes"), (0.8871, "no"), (0.877, "yes"), (0.5, "yes"), (1.0, "no")],
)
def test_a_hundredth_below_the_baseline_is_still_enough(baseline, expected):
    assert verdict(version(baseline_pixels_auc=baseline))[0] == expected


def test_the_best_baseline_counts_on_the_metric_of_the_gate():
    one = version(
        baseline_pixels_auc=0.6, baseline_size_auc=0.95, baseline_chance_auc=0.5,
        baseline_pixels_accuracy=0.62, baseline_size_accuracy=0.5, baseline_chance_accuracy=0.55,
        baseline_pixels_balanced_accuracy=0.99,
    )  # fmt: skip
    assert "0.9500 (logistic regression, width and height" in verdict(one)[1]
    assert "0.6200 (logistic regression, pixels" in verdict(one, metric="accuracy")[1]


def test_a_network_below_chance_is_a_no():
    told = verdict(version(baseline_chance_accuracy=0.7), metric="accuracy")
    assert told[0] == "no"
    assert "0.7000 (chance (largest class)" in told[1]


def test_a_baseline_counts_even_if_the_champion_is_worse():
    worse = version(1, auc=0.5)
    assert verdict(version(2, baseline_pixels_auc=0.95), worse)[0] == "no"
    assert verdict(version(2, baseline_pixels_auc=0.85), worse)[0] == "yes"


def test_force_and_the_switch_promote_and_force_says_why():
    one = version(baseline_pixels_auc=0.95)
    assert verdict(one, beats_baseline=False) == (
        "yes", "test auc 0.8770 of version 1, and there is no champion yet",
    )  # fmt: skip
    told = verdict(one, force=True)
    assert told[0] == "yes"
    assert told[1].startswith("forced, although test auc 0.8770 of version 1 is more than 0.01 below the baseline's")


@pytest.mark.parametrize("champion", [None, version(1, auc=0.5), version(2)], ids=["none", "other", "itself"])
@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({}, "(not compared with a baseline: no auc of one was recorded)"),
        ({"baseline_pixels_accuracy": 0.99}, "(not compared with a baseline: no auc of one was recorded)"),
        ({"baseline_pixels_auc": "nan"}, "(not compared with a baseline: no auc of one was recorded)"),
        ({"baseline_pixels_auc": "much"}, "(not compared with a baseline: no auc of one was recorded)"),
        ({"baseline_all_absent": "multilabel"}, "(not compared with a baseline: baseline all: multilabel)"),
        ({"baseline_chance_auc": 0.5, "baseline_pixels_absent": "no class b"}, "(absent baseline pixels: no class b)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_absent_baseline_is_said_and_not_judged(champion, tags, says):
    told = verdict(version(2, **tags), champion)
    assert told[0] == "yes"
    assert told[1].endswith(says)


def test_nothing_is_said_where_every_baseline_was_compared():
    told = verdict(version(baseline_pixels_auc=0.8, baseline_chance_auc=0.5))
    assert told == ("yes", "test auc 0.8770 of version 1, and there is no champion yet")


def test_a_promotion_from_before_the_rule_stays_done(tmp_path):
    """Its config has no such field, and its version no such tags."""
    store, gate = open_store(str(tmp_path)), GateConfig()
    step = Step("promote", promote.run, gate)
    out = store.at("runs", "r", "promote")
    before = {name: value for name, value in gate.model_dump(mode="json").items() if name != "beats_baseline"}
    out.put("config.json", json.dumps({"config": before, "inputs": {}}).encode())
    assert [state.state for state in plan_steps([step], store, "r")] == ["interrupted"]
    record = {
        "facts": {"digest": "0" * 64, "verdict": "yes"}, "inputs": {}, "seconds": 1.0, "started": "", "finished": "",
        "placement": {}, "git_commit": "", "packages": {},
    }  # fmt: skip
    out.put("record.json", json.dumps(record).encode())
    assert [state.state for state in plan_steps([step], store, "r")] == ["done"]


def test_an_interrupted_promotion_from_before_the_rule_completes(tmp_path):
    out, candidate = open_store(str(tmp_path)), version(2, baseline_pixels_auc=0.99)
    decision = {"verdict": "yes", "reason": "", "previous": 1, "version": 2, "forced": False}
    decision |= {"alias": "champion", "metric": "auc"}
    out.put(DECISION, json.dumps(decision).encode())
    assert _kept(out, GateConfig(), version(1), candidate, None) == decision


def test_a_recipe_kept_before_the_rule_has_it_by_default():
    kept = recipe("quickstart").model_dump(mode="json")
    del kept["gate"]["beats_baseline"]
    values = type(recipe("quickstart")).model_validate(kept)
    assert values == recipe("quickstart")
    assert WORKFLOWS["direct"](values)[-1].config.beats_baseline is True
