"""The table of a judged model: what is beside its metrics, and what could not be had."""

from drawn_predictions import drawn
from finished_run import FACTS

from data_shards.store import open_store
from pipelines.commands.summary import print_summary
from pipelines.evaluation.study import study
from pipelines.flow import StepState
from pipelines.flow.record import Record


def printed(store, capsys, step: str = "evaluate", **more) -> str:
    facts = {**FACTS[step], **more}
    record = Record(facts, {}, 3.0, started="", finished="", placement={}, git_commit="", packages={})
    print_summary([StepState(step, "done", record)], store, "r")
    return " ".join(capsys.readouterr().out.split())


def test_the_auc_interval_and_an_absent_baseline_are_reported(tmp_path, capsys):
    store = open_store(str(tmp_path))
    told = printed(store, capsys, intervals={"auc": [0.8123, 0.9456]}, absent_baselines={"size": "[no] class b"})
    assert "95 % interval of the network's AUC, by group: 0.812 to 0.946" in told
    assert "logistic regression, width and height: not available ([no] class b)" in told
    assert "95 % interval" not in printed(store, capsys, intervals={})


def test_with_a_study_the_balanced_accuracy_is_printed_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    store, file = open_store(str(tmp_path)), "runs/r/evaluate/evaluation.json"
    before = printed(store, capsys, intervals={"auc": [0.8123, 0.9456]})
    assert "balanced ┃ sens. ┃ spec." in before
    assert "Classes of the test split" not in before
    found, _ = study(drawn(["a", "b"]))
    store.put(file, found.model_dump_json().encode())
    told = printed(store, capsys, intervals={"auc": [0.8123, 0.9456]}, study=file)
    assert "balanced ┃ spec. ┃ F1" in told
    assert "Classes of the test split" in told
    assert "95 % interval of the network's AUC" not in told
    assert f"study │ {store.uri}/{file}" in told


def test_a_training_says_which_weights_it_started_from(tmp_path, capsys):
    store = open_store(str(tmp_path))
    assert "started from models:/m/3" in printed(store, capsys, "train", init={"uri": "models:/m/3", "digest": "d"})
    assert "started from" not in printed(store, capsys, "train")
