"""What steps record: records of earlier code are read, and what users see of them is a line or two."""

import json
from pathlib import Path

import pytest
from finished_run import FACTS as SMALLEST

from data_shards.store import open_store
from pipelines.console.terminal import Terminal
from pipelines.flow import Facts, Record, Step, WorkflowError, run_steps
from pipelines.flow.runner import step_folder
from pipelines.recipes import Recipe
from pipelines.steps.context import StepContext
from pipelines.steps.facts import FACTS, EvaluateFacts, PromoteFacts, ShardFacts, TrainFacts, TuneFacts, read_facts
from pipelines.workflows import WORKFLOWS

EARLIER = json.loads((Path(__file__).parents[1] / "earlier_runs.json").read_text())["store"]
RECORDS = {key: json.loads(text) for key, text in EARLIER.items() if key.endswith("/record.json")}


def record(step: str, **facts) -> Record:
    return Record({**SMALLEST[step], **facts}, {}, 3.0, "", "2026-12-01T02:29:30.000+00:00", {}, "", {})


@pytest.mark.parametrize("key", RECORDS)
def test_a_record_of_earlier_code_is_read_with_all_that_it_has(key):
    step = key.split("/")[2]
    found = read_facts(step, Record(**RECORDS[key]))
    assert type(found) is FACTS[step]
    assert found.model_dump(exclude_unset=True) == RECORDS[key]["facts"]
    assert found.line()
    assert all(found.lines(RECORDS[key]["finished"]))


def test_there_are_records_of_every_step_of_earlier_code():
    assert {key.split("/")[2] for key in RECORDS} >= {"shard", "train", "evaluate", "register", "promote"}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_step_declares_its_facts(workflow):
    assert {step.name: step.facts for step in WORKFLOWS[workflow](Recipe())}.items() <= FACTS.items()


@pytest.mark.parametrize(
    ("step", "facts", "kind", "lines"),
    [
        (
            "shard",
            {"num_images": 1, "num_shards": 1, "quarantine": 0, "counts": {"train": {"a": 1}}},
            ShardFacts,
            ["1 image of 1 class in 1 shard", "1 image in 1 shard", f"manifest {'5' * 12}"],
        ),
        (
            "tune",
            {"trials": [{"stopped_early": False, "error": None}], "winner_number": 1, "winner": {"train.epochs": 3}},
            TuneFacts,
            [
                "1 trial, winner trial 1/1",
                "1 trial, 0 stopped early, 0 failed",
                "winner: trial 1/1",
                "winner: train.epochs = 3",
            ],
        ),
        (
            "train",
            {"epochs": 1, "best_epoch": 1},
            TrainFacts,
            ["epoch 1, val AUC 0.9123", "best of 1 epoch: 1, val AUC 0.9123"],
        ),
        (
            "evaluate",
            {"num_samples": 1},
            EvaluateFacts,
            ["test AUC 0.9000 over 1 image", "test AUC 0.9000 over 1 image"],
        ),
        (
            "promote-forced-2",
            {},
            PromoteFacts,
            [
                "yes: there is no champion yet",
                "yes: there is no champion yet",
                "decided on 2026-12-01 02:29 UTC",
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_lines_of_a_step_count_in_the_singular_too(step, facts, kind, lines):
    made = record(step.partition("-")[0], **facts)
    found = read_facts(step, made)
    assert type(found) is kind
    assert [found.line(), *found.lines(made.finished)] == lines


def test_an_evaluation_shows_its_study_where_it_has_one():
    files = {"study": "runs/r/evaluate/evaluation.json", "calibration": "runs/r/evaluate/calibration.json"}
    places = read_facts("evaluate", record("evaluate", **files)).places("/store")
    assert dict(places) == {
        "predictions": "/store/runs/r/evaluate/predictions.parquet",
        "study": "/store/runs/r/evaluate/evaluation.json",
        "calibration": "/store/runs/r/evaluate/calibration.json",
    }
    assert [what for what, _ in read_facts("evaluate", record("evaluate")).places("/store")] == ["predictions"]


def test_facts_no_release_records_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"step train is not valid \(epochs = 'many': .*restore it, or"):
        read_facts("train", record("train", epochs="many"))


def test_a_step_of_another_project_has_a_digest_and_no_line():
    assert read_facts("clean", record("train")).line() == ""


def test_a_step_returning_undeclared_facts_is_our_mistake(tmp_path):
    class Counted(Facts):
        num: int

    store, quiet = open_store(str(tmp_path)), Terminal(quiet=True)
    for returned, fails in (({"digest": "d"}, True), ({"digest": "d", "num": 3}, False)):
        step = Step("count", lambda *_, facts=returned: facts, Recipe().gate, is_spread=False, facts=Counted)
        try:
            run_steps([step], store, "r", open_context=lambda: StepContext(store, "r", None, None, quiet), show=quiet)
            failed = False
        except WorkflowError as error:
            failed = isinstance(error.failures["count"], AssertionError)
        assert failed == fails
        assert (step_folder(store, "r", "count").head("record.json") is None) == fails
