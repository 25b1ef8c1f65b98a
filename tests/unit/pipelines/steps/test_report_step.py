"""The step report on a SQLite file: what it stores, what MLflow has, and where the user is told to look."""

import hashlib

import pytest
from reported_run import store_run

from pipelines.console.terminal import Terminal
from pipelines.flow.runner import in_order
from pipelines.recipes import Recipe
from pipelines.report.make import JSON, MARKDOWN, PAGE
from pipelines.steps import report
from pipelines.steps.context import StepContext
from pipelines.steps.facts import ReportFacts
from pipelines.tracking import open_tracking
from pipelines.workflows import WORKFLOWS, until


def test_the_page_and_the_card_are_stored_and_logged(tmp_path):
    store = store_run(tmp_path)
    tracking = open_tracking(store)
    around = StepContext(store=store, run="r", placement=None, tracking=tracking, show=Terminal(quiet=True))
    out = store.at("runs", "r", "report")
    inputs = {"shard": {"digest": "5" * 64}, "train": {}, "evaluate": {}}
    facts = report.run(report.ReportConfig(images=0), None, out, around, **inputs)
    assert {PAGE, MARKDOWN, JSON} <= {key.rpartition("/")[2] for key in store.list("runs/r/report/")}
    logged = tracking.client.list_artifacts(facts["mlflow_run"])
    assert {each.path for each in logged} == {PAGE, MARKDOWN, JSON}
    page = tracking.client.download_artifacts(facts["mlflow_run"], PAGE, str(tmp_path))
    with open(page, "rb") as file:
        assert hashlib.sha256(file.read()).digest() == hashlib.sha256(out.get(PAGE)).digest()
    assert tracking.client.get_run(facts["mlflow_run"]).info.status == "FINISHED"
    again = report.run(report.ReportConfig(images=0), None, out, around, **inputs)
    assert again == facts, "the same run in MLflow, the same bytes"
    found = ReportFacts.model_validate(facts)
    assert found.places(store.uri) == [("report", f"{store.uri}/runs/r/report/report.html")]
    assert found.line() == "runs/r/report/report.html"


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_it_comes_before_the_registration_which_does_not_need_it(workflow):
    steps = WORKFLOWS[workflow](Recipe())
    names = [step.name for step in in_order(steps)]
    assert names.index("evaluate") < names.index("report") < names.index("register")
    assert "report" not in [step.name for step in until(steps, "promote")]
