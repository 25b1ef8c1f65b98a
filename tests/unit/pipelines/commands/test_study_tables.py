"""A study on the terminal: 80 columns for any number of classes and length of names, and nothing printed twice."""

import json

import pytest
from drawn_predictions import drawn
from finished_run import FACTS, finish

from data_shards.store import open_store
from pipelines.cli import main
from pipelines.commands.study.tables import print_study
from pipelines.evaluation.calibrator import Calibrator
from pipelines.evaluation.parts import Study
from pipelines.evaluation.study import study
from pipelines.recipes import Recipe

FILE = "runs/r/evaluate/evaluation.json"


def studied(names, **how) -> tuple[Study, Calibrator | None]:
    return study(drawn(names, **how), drawn(names, seed=1, split="val", **how))


def printed(found: Study, capsys) -> str:
    print_study(found)
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    return shown


def test_each_class_has_its_figures_and_the_matrix_its_counts(capsys):
    found, _ = studied(["no lesion", "smooth ellipse", "spiculated mass"])
    shown = printed(found, capsys)
    for number, (name, row) in enumerate(zip(found.classes, found.confusion, strict=True), 1):
        figures = found.by_class[number - 1].figures
        cells = [f"{figures[each].value:.3f}" for each in ("sensitivity", "specificity", "precision", "f1")]
        auc = figures["auc"]
        expected = [name, "200", f"{auc.value:.3f}", f"{auc.low:.3f}-{auc.high:.3f}", *cells]
        assert expected in [[cell.strip() for cell in line.split("│")] for line in shown.splitlines()]
        assert [f"{number} {name}", *map(str, row)] in [
            [cell.strip() for cell in line.split("│")] for line in shown.splitlines()
        ]


def test_every_macro_figure_has_its_interval_once(capsys):
    found, _ = studied(["a", "b", "c"])
    shown = printed(found, capsys)
    for name, each in found.macro.items():
        if name != "balanced_accuracy":
            assert f"{each.low:.3f} to {each.high:.3f}" in shown
    assert shown.count("balanced accuracy") == 1
    assert "sensitivity (balanced accuracy)" in shown
    several, _ = studied(["a", "b", "c"], task="multilabel")
    shown = printed(several, capsys)
    assert "sensitivity (" not in shown
    assert "balanced accuracy" in shown


def test_calibration_and_the_size_of_the_sample_are_sentences(capsys):
    found, calibrator = studied(["a", "b", "c"])
    shown = " ".join(printed(found, capsys).split())
    raw, calibrated = found.calibration.raw.error, found.calibration.calibrated.error
    assert (
        f"Calibration error (ECE) {raw.value:.3f} ({raw.low:.3f} to {raw.high:.3f}) -> {calibrated.value:.3f}" in shown
    )
    assert f"(temperature {calibrator.temperature:.3g})" in shown
    assert found.sample_size in shown
    alone, _ = study(drawn(["a", "b", "c"]))
    assert "not calibrated: no validation predictions" in " ".join(printed(alone, capsys).split())


def test_a_weak_site_is_the_worst_subgroup(capsys):
    found, _ = studied(["a", "b", "c"], weak_site=True)
    assert found.subgroups[0].figures["auc"].value < 0.6
    assert f"Worst subgroup: site south, AUC {found.subgroups[0].figures['auc'].value:.3f} (" in printed(found, capsys)


@pytest.mark.parametrize("num", [2, 9, 12, 13, 40])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_long_names_and_many_classes_fit_80_columns(num, task, capsys):
    names = [f"{i:02} pneumonoultramicroscopicsilicovolcanoconiosis of the left lung" for i in range(num)]
    found, _ = studied(names, task=task, num=2000)
    shown = printed(found, capsys)
    assert "│ " in shown
    if task == "multiclass":
        assert ("Largest confusions" in shown) == (num > 12)
        assert ("Confusion matrix" in shown) == (num <= 12)
    if num == 40:
        assert "20 more classes" in shown
        worst = min(found.by_class, key=lambda each: each.figures["auc"].value)
        assert f"{worst.name[:14]}…" in shown


def test_counts_too_wide_for_a_matrix_become_a_list(capsys):
    found, _ = studied([f"c{i}" for i in range(12)])
    wide = found.model_copy(update={"confusion": [[count + 12_345 for count in row] for row in found.confusion]})
    shown = printed(wide, capsys)
    assert "Confusion matrix" not in shown
    assert shown.count("12,3") == 10
    assert "122 more pairs of classes" in shown


def test_status_and_json_have_the_study_of_a_run(tmp_path, capsys):
    found, _ = studied(["a", "b"])
    finish(str(tmp_path), "r", Recipe(), workflow="direct", evaluate={**FACTS["evaluate"], "study": FILE})
    open_store(str(tmp_path)).put(FILE, found.model_dump_json().encode())
    assert main(["status", "r", "--store", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Classes of the test split" in shown
    assert f"complete study: {tmp_path}/{FILE}" in shown
    assert main(["status", "r", "--store", str(tmp_path), "--json"]) == 0
    rows = {row["step"]: row for row in json.loads(capsys.readouterr().out)}
    assert Study.model_validate(rows["evaluate"]["evaluation"]) == found
    assert "evaluation" not in rows["train"]


def test_a_damaged_study_is_a_line_and_an_old_run_has_none(tmp_path, capsys):
    store = open_store(str(tmp_path))
    finish(store.uri, "r", Recipe(), workflow="direct", evaluate={**FACTS["evaluate"], "study": FILE})
    store.put(FILE, b"{}")
    assert main(["status", "r", "--store", store.uri]) == 0
    assert "evaluation.json is damaged" in capsys.readouterr().out
    finish(store.uri, "old", Recipe(), workflow="direct")
    assert main(["status", "old", "--store", store.uri]) == 0
    assert "complete study" not in capsys.readouterr().out
