"""The command line as a person meets it: what it prints, what it refuses and how, its exit codes. Starts no Ray."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import registered
from finished_run import NO, finish
from PIL import Image
from rich.console import Console

import pipelines.bench.measure
from data_shards.catalog import card
from data_shards.store import open_store
from pipelines.bench.measure import COMPARED, Case, Row
from pipelines.bench.networks import _speed_table
from pipelines.cli import VERBS, main
from pipelines.cluster.stops import Paused
from pipelines.commands.promote import PROMOTE, forced_steps
from pipelines.commands.step import TRAIN
from pipelines.commands.work.begun import WORKFLOW_FILE
from pipelines.commands.work.connect import BEGAN, time_is_up
from pipelines.commands.work.read import read_work
from pipelines.console import terminal
from pipelines.flow import run_steps
from pipelines.flow.record import read_record
from pipelines.override import override
from pipelines.placement import Node, PlacementConfig, resolve
from pipelines.recipes import RECIPES, Recipe, recipe
from pipelines.tracking import open_tracking
from pipelines.tracking.leases import driver_lease
from pipelines.tracking.registry import by_alias
from pipelines.worker.engine.first_format import SNAPSHOT

ROOT = Path(__file__).resolve().parents[3]
DRY = ("--recipe", "quickstart", "--dry-run")
PLACED = resolve(PlacementConfig(), [Node(2)])


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def told(capsys, *argv: str, code: int) -> str:
    """Runs the command, holds the exit code, and returns the single line on standard error."""
    assert main(argv) == code
    seen = capsys.readouterr()
    assert seen.out == ""
    (line,) = seen.err.splitlines()
    assert line.startswith("medmamba: ")
    for noise in ("Traceback", "pydantic", "input_value", "───"):
        assert noise not in line
    return line


def resolved(capsys, *argv: str) -> dict:
    """What a dry run prints as JSON."""
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def source_of(name: str) -> list[str]:
    """The option that names the images of a recipe, for those that do not make their own; a dry run looks for them."""
    if recipe(name).data.dataset == "phantoms":
        return []
    for label in card("kvasir").classes:  # the one recipe whose images are in folders of classes
        Path("images", label).mkdir(parents=True, exist_ok=True)
        Path("images", label, "1.jpg").touch()
    return ["--data.source", "images"]


def test_help_names_every_verb_recipe_and_exit_code(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert all(name in text for name in RECIPES)
    assert "3 rejected by the gate" in text


def test_help_says_how_to_get_completion_and_the_version(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert "medmamba --print-completion bash > ~/.local/share/bash-completion/completions/medmamba" in text
    assert "medmamba --version" in text


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"medmamba {project['version']}\n"


def test_a_source_tree_that_is_not_installed_knows_its_version(tmp_path):
    for name in ("pipelines", "medmamba", "data_shards", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    # Without the folder of this environment's own installation.
    code = (
        "import importlib.metadata as m, sys\n"
        "found = m.version\n"
        "def version(name):\n"
        "    if name == 'medmamba': raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
        "from pipelines.cli import main; sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert re.fullmatch(r"medmamba \d+\.\d+\.\d+\n", done.stdout), done.stderr


def test_no_verb_prints_the_help_and_is_wrong_use(capsys):
    assert main([]) == 2
    assert "usage: medmamba VERB" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: medmamba {verb}")
    assert "--help" in text


def test_a_verbs_help_shows_the_recipes_values_and_help_texts(capsys):
    main(["train", "--recipe", "breastmnist", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--train.epochs INT Passes over the training split. (default: 50)" in text
    assert "--model.variant {T,S,B,nano}" in text
    assert "--placement.workers INT" in text


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("workflow", ["release", "direct"])
def test_every_recipe_dry_runs_in_every_workflow_writing_nothing(name, workflow, capsys, tmp_path):
    found = resolved(capsys, "run", workflow, "--recipe", name, "--dry-run", *source_of(name))
    assert override(recipe(name), {"data.source": found["recipe"]["data"]["source"]}) == Recipe(**found["recipe"])
    assert (found["run"], found["workflow"]) == (name, workflow)
    assert set(found["steps"].values()) == {"to do"}
    assert ("tune" in found["steps"]) == (workflow == "release")
    assert {path.name for path in tmp_path.iterdir()} <= {"images"}


def test_a_dry_run_prints_configuration_and_step_states(capsys):
    assert main(["run", "release", *DRY]) == 0
    text = capsys.readouterr().out
    assert '"batch_size": 32' in text
    steps = re.findall(r"^(\w+) +│ (to do)", text, re.MULTILINE)
    assert [name for name, _ in steps] == ["shard", "tune", "train", "evaluate", "report", "register", "promote"]


@pytest.mark.parametrize("verb", ["run", "train", "shard", "tune", "evaluate"])
def test_whatever_trains_can_be_profiled_outside_the_recipe(verb, capsys):
    if verb in ("run", "train"):
        assert resolved(capsys, verb, *DRY, "--profile") == resolved(capsys, verb, *DRY)
    else:
        assert main([verb, *DRY, "--profile"]) == 2
        assert "--profile" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["shard", "tune", "train", "evaluate", "register", "promote"])
def test_a_step_of_its_own_has_what_it_needs_before_it(verb, capsys):
    steps = list(resolved(capsys, verb, *DRY)["steps"])
    assert (steps[0], steps[-1]) == ("shard", verb)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--train.optim.lr", "3e-4"], "train.optim.lr", 3e-4),
        (["--train.optim.lr=3e-4"], "train.optim.lr", 3e-4),
        (["--train.batch_size", "64"], "train.batch_size", 64),
        (["--tune.space.lr", "1e-4", "1e-3"], "tune.space.lr", [1e-4, 1e-3]),
        (["--tune.space.lr"], "tune.space.lr", []),
        (["--tune.space.batch-size", "16", "32"], "tune.space.batch_size", [16, 32]),
        (["--model.variant", "T"], "model.variant", "T"),
        (["--data.dataset", "own", "--data.layout", "folders", "--data.source", ".", "--data.classes", "b", "a"],
         "data.classes", ["b", "a"]),
        (["--data.max-side", "64"], "data.max_side", 64),
        (["--data.max-side", "None"], "data.max_side", None),
        (["--train.optim.betas", "0.8", "0.9"], "train.optim.betas", [0.8, 0.9]),
        (["--train.class-weights"], "train.class_weights", True),
        (["--train.no-class-weights"], "train.class_weights", False),
        (["--data.seed", "1", "--data.seed", "2"], "data.seed", 2),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_an_option_sets_one_field(argv, key, value, capsys):
    for label in ("a", "b"):
        Path(label).mkdir()
        Path(label, "1.png").touch()
    found = resolved(capsys, "run", "release", *DRY, *argv)["recipe"]
    for part in key.split("."):
        found = found[part]
    assert found == value


def test_booleans_on_in_a_recipe_can_be_switched_off(capsys):
    found = resolved(capsys, "train", "--recipe", "bccd", "--dry-run", "--train.augment.no-rot90", *source_of("bccd"))
    assert found["recipe"]["train"]["augment"]["rot90"] is False


def test_the_network_is_chosen_by_its_kind(capsys):
    found = resolved(capsys, "run", "release", *DRY, "--model.kind", "convnet", "--model.blocks", "2")
    assert found["recipe"]["model"] == {"kind": "convnet", "num_classes": 0, "widths": [16, 32, 64, 128], "blocks": 2}


def test_the_placement_is_resolved_but_not_part_of_the_recipe(capsys, monkeypatch):
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')
    found = resolved(capsys, "train", *DRY, "--placement.workers", "2", "--placement.zero-stage", "1")
    placement = found["placement"]
    assert (placement["workers"], placement["zero_stage"], placement["cpus_per_worker"]) == (2, 1, 2)
    assert (placement["scan"], found["placed_on"], found["notes"]) == ("auto", "this machine", [])
    assert Recipe.model_validate(found["recipe"]) == recipe("quickstart")


# Workers of a training on 1 to 8 GPUs: the most that divide the micro-batches of every batch that may be trained.
WORKERS = {
    ("quickstart", "release"): [1] * 8,  # the sweep may choose batches of one micro-batch
    ("quickstart", "direct"): [1, 2, 2, 2, 2, 2, 2, 2],
    ("pneumoniamnist", "release"): [1, 2, 2, 2, 2, 2, 2, 2],
    ("pneumoniamnist", "direct"): [1, 2, 2, 2, 2, 2, 2, 2],
    ("breastmnist", "release"): [1] * 8,
    ("breastmnist", "direct"): [1] * 8,
    ("bccd", "release"): [1] * 8,
    ("bccd", "direct"): [1] * 8,
    ("paper-medmnist", "release"): [1, 2, 2, 4, 4, 4, 4, 4],
    ("paper-medmnist", "direct"): [1, 2, 2, 4, 4, 4, 4, 4],
    ("paper", "release"): [1, 2, 2, 4, 4, 4, 4, 4],
    ("paper", "direct"): [1, 2, 2, 4, 4, 4, 4, 4],
}


@pytest.mark.parametrize("num_gpus", range(1, 9))
def test_every_recipe_runs_on_any_number_of_gpus(num_gpus, capsys, monkeypatch):
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 64, "GPU": num_gpus}))
    assert {name for name, _ in WORKERS} == set(RECIPES)
    for (name, workflow), expected in WORKERS.items():
        found = resolved(capsys, "run", workflow, "--recipe", name, "--dry-run", *source_of(name))
        workers = expected[num_gpus - 1]
        assert (found["placement"]["workers"], found["placement"]["concurrent_trials"]) == (workers, num_gpus), (
            name,
            workflow,
        )
        assert found["placement"]["device"] == "cuda"
        assert [note.partition(" for training: ")[0] for note in found["notes"]] == (
            [f"{workers} of {num_gpus} GPUs"] if workers < num_gpus else []
        )


def test_a_dry_run_says_in_plain_lines_where_it_would_run(capsys, monkeypatch):
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 16, "GPU": 2}')
    assert main(["run", "direct", *DRY, "--train.batch-size", "16"]) == 0
    *_, placement, note = capsys.readouterr().out.splitlines()
    assert placement == (
        "placement on this machine: 1 x 16 CPU on cuda, ZeRO 0, scan auto (decided on a worker), compiled if it pays, "
        "2 trials at once"
    )
    assert note == (
        "1 of 2 GPUs for training: batch size 16 in micro-batches of 16 cannot be shared evenly by more workers; "
        "raise the batch size or lower train.micro_batch to use all"
    )


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--placement.workers", "2"], r"batch_size 16 is not a multiple of train\.micro_batch 16 x 2 workers; lower"),
        (["--placement.workers", "5"], r"--placement\.workers 5: one GPU per worker, and this Ray has 4; .*at most 4"),
        (
            ["--placement.concurrent-trials", "5"],
            r"--placement\.concurrent-trials 5: one GPU per trial, and this Ray has 4",
        ),
        (["--placement.cpus-per-worker", "9"], r"workers 1 x --placement\.cpus-per-worker 9 = 9 CPUs, .*has 8"),
        (["--placement.device", "cpu", "--placement.workers", "64"], r"workers 64: 0\.12 of the 8 CPUs"),
        (["--data.dataset", "breastmnist"], r"'breastmnist' needs its files; download them .* and set --data\.source"),
        (["--data.dataset", "own", "--data.layout", "folders"], r"'own' needs its files; set --data\.source"),
        (["--data.dataset", "breastmnist", "--data.source", "typo.npz"], r"typo\.npz was not found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_could_not_run_is_refused_by_a_dry_run_too(argv, line, capsys, monkeypatch):
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 8, "GPU": 4}')
    assert re.search(line, told(capsys, "run", "release", *DRY, *argv, code=1))


def test_a_dry_run_on_an_absent_ray_is_an_error_only_if_needed(capsys, monkeypatch):
    finish("store", "r", recipe("quickstart"), last="evaluate")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
        assert "no Ray answers there" in told(capsys, "train", *DRY, code=1)
        found = resolved(capsys, "promote", "--run", "r", "--store", "store", "--dry-run")
    assert (found["steps"]["promote"], found["placement"], found["placed_on"]) == ("to do", None, None)


def test_mlflow_is_opened_to_the_end_where_ray_does_not_answer():
    """A thread ends with its process, and MLflow cannot open a database whose migrations were cut off."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        command = [sys.executable, "-m", "pipelines", "train", "--recipe", "quickstart", "--store", "store"]
        env = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{closed.getsockname()[1]}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert "no Ray answers there" in done.stderr
    with sqlite3.connect("store/mlflow.db") as database:
        assert ("medmamba",) in database.execute("select name from experiments").fetchall()


def test_once_the_sweep_has_a_winner_its_batch_size_counts(capsys, monkeypatch):
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 8, "GPU": 2}')
    for size, workers in ((16, 1), (32, 2)):
        winner = {"digest": "t", "winner": {"train.batch_size": size}, "trials": []}
        finish("store", f"won-{size}", recipe("quickstart"), last="tune", tune=winner)
        found = resolved(capsys, "train", "--workflow", "release", "--run", f"won-{size}", "--store", "store", *DRY)
        assert (found["steps"]["tune"], found["placement"]["workers"]) == ("done", workers)


def test_a_finished_training_does_not_limit_later_gpus(capsys, monkeypatch):
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 8, "GPU": 3}')
    finish("store", "r", recipe("breastmnist"), last="train")
    found = resolved(capsys, "evaluate", "--run", "r", "--store", "store", "--dry-run")
    assert (found["placement"]["workers"], found["notes"]) == (3, [])


@pytest.mark.parametrize("begun_on", [1, 2, 4])
def test_a_first_format_checkpoint_resumes_on_its_worker_count(begun_on, capsys, monkeypatch):
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 8, "GPU": 4}')
    sizes = override(recipe("quickstart"), {"train.batch_size": 64})
    finish("store", "r", sizes, workflow="direct", last="train", failing=["train"])
    out = open_store("store").at("runs/r/train")
    state: dict = {"epoch": 3, "ranks": begun_on, "zero_stage": 1, "manifest": "5" * 64, "seed": 0}
    state |= {"consumed": 0, "step": 30, "best_epoch": 3, "best": {}, "history": [], "digests": {}}
    out.put("ray/checkpoint_1/train.json", json.dumps(state).encode())
    out.put(SNAPSHOT, json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": "checkpoint_1"}}).encode())
    asked = ["train", "--run", "r", "--store", "store", "--dry-run"]
    found = resolved(capsys, *asked)
    assert found["placement"]["workers"] == begun_on
    assert ("as many as wrote the checkpoint" in "".join(found["notes"])) == (begun_on < 4)
    # Checkpoints from before there were compiled trainings and flat parameters have neither.
    settings = ("zero_stage", "compile", "flat")
    assert [found["placement"][name] for name in settings] == [1, "off", False]
    state |= {"compile": "on", "flat": True, "zero_stage": 2}
    out.put("ray/checkpoint_1/train.json", json.dumps(state).encode())
    assert [resolved(capsys, *asked)["placement"][name] for name in settings] == [2, "on", True]
    chosen = resolved(capsys, *asked, "--placement.compile", "off")["placement"]
    assert [chosen[name] for name in settings] == [2, "off", True]
    wrong = told(capsys, *asked, "--placement.zero-stage", "1", code=1)
    assert f"use --placement.workers {begun_on} --placement.zero-stage 2" in wrong


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], r"unknown command 'trian'; did you mean train\? available: quickstart, run"),
        (["train"], "train: give a recipe .*or an existing run"),
        (["train", "--recipe", "quikstart"], "unknown recipe; did you mean quickstart?"),
        (["train", *DRY, "--data.dataset", "bloodmnst"], "'bloodmnst' is not in the catalog .*'bloodmnist'"),
        (["train", *DRY, "--data.dataset", "../x"], r"data\.dataset = '\.\./x'.*letters, digits"),
        (["train", *DRY, "--train.optim.rate", "1"], r"--train\.optim\.rate, 1; did you mean --train\.optim\.lr"),
        (["train", *DRY, "--lr", "1"], r"--lr, 1; did you mean --train\.optim\.lr, --tune\.space\.lr\?"),
        (["train", *DRY, "extra"], "Unrecognized options: extra"),
        (["train", *DRY, "--train.optim.lr", "-1"], r"train\.optim\.lr = -1\.0: .*greater than 0"),
        (["train", *DRY, "--train.optim.lr", "fast"], r"--train\.optim\.lr: could not convert .*'fast'"),
        (["train", *DRY, "--train.epochs"], r"Missing value for argument '--train\.epochs'"),
        (["train", *DRY, "--train.epochs", "1.5"], r"--train\.epochs: invalid literal .*'1\.5'"),
        (["train", *DRY, "--model.variant", "X"], r"invalid choice 'X' .*--model\.variant.*'nano'"),
        (["train", *DRY, "--model.kind", "resnet"], r"--model\.kind resnet: unknown value; available: medmamba"),
        (["train", *DRY, "--model.dims", "24", "48"], r"model: dims \(24, 48\) and depths"),
        (["train", *DRY, "--train.batch-size", "33"], "train: batch_size 33 is not a multiple of micro_batch 16"),
        (["train", *DRY, "--placement.workers", "-1"], r"placement\.workers = -1: .*greater than or equal to 0"),
        (["train", *DRY, "--placement.zero-stage", "4"], r"invalid choice '4' .*--placement\.zero-stage"),
        (["tune", *DRY, "--tune.space.lr", "1e-3"], r"tune\.space: lr \(0\.001,\): give the lowest and the highest"),
        (["tune", *DRY, "--tune.space.lr", "1e-3", "1e-4"], r"tune\.space: lr .*swap them"),
        (["tune", *DRY, "--tune.space.lr", "0", "1e-4"], r"tune\.space: lr .*above 0"),
        (["tune", *DRY, "--tune.space.drop-path", "0", "1"], r"model\.drop_path = 1\.0: .*less than 1"),
        (["tune", *DRY, "--tune.space.batch-size", "17"], r"tune\.space\.batch_size 17 is not a multiple"),
        (
            ["tune", *DRY, "--workflow", "direct"],
            "direct: unknown step 'tune' in this workflow; available: shard, train",
        ),
        (["run", "relaese", *DRY], "invalid choice 'relaese' .*'release', 'direct'"),
        (["run", "direct", *DRY, "--until", "tune"], "direct: unknown step 'tune' in this workflow"),
        (["run", *DRY, "--run", "../x"], r"--run '\.\./x': not a valid name"),
        (["run", *DRY, "--run", "a b"], "--run 'a b'"),
        (["run", *DRY, "--run", ".hidden"], r"--run '\.hidden'"),
        (["run", *DRY, "--run", "x" * 101], "at most 100"),
        (["run", "--run", "nothing"], "run 'nothing' not found in .*; give a recipe"),
        (["run", *DRY, "--store", "http://x"], "--store: 'http://x' is not a store; use a folder or s3://"),
        (["status", "--store", "s3://"], "--store: 's3://' has no bucket"),
        (["train", *DRY, "--wait-s", "nan"], "--wait-s nan: give seconds, 0 or more"),
        (["train", *DRY, "--wait-s", "-1"], "--wait-s -1: give seconds, 0 or more"),
        (["train", *DRY, "--max-minutes", "nan"], "--max-minutes nan: give minutes above 0, or 0"),
        (["status", "nothing"], "run 'nothing' not found"),
        (["datasets", "bloodmnst"], "did you mean 'bloodmnist'"),
        (["shards", "verfy"], "shards: unknown command 'verfy'; available: verify, show, duplicates"),
        (["datasets", "a", "b"], "datasets: Unrecognized options: b"),
        (
            ["train", *DRY, "--placement.scan", "nosuch"],
            "--placement.scan nosuch: unknown backend; available: auto, reference, numba",
        ),
        (["predict"], "predict: give at least one image"),
        (["submit"], "submit: nothing to run; put the command after --"),
        (
            ["submit", "--address", "http://127.0.0.1:1", "--", "medmamba", "trian"],
            r"unknown command 'trian'; did you mean train",
        ),
        (["submit", "run", "release"], "submit: nothing to run; put the command after --"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_wrong_use_is_one_clear_line_and_exit_code_2(argv, line, capsys, tmp_path):
    assert re.search(line, told(capsys, *argv, code=2))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_store_is_one_line_and_exit_code_1(capsys):
    assert main(["train", "--recipe", "quickstart", "--store", "/sys/medmamba"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("medmamba: /sys/medmamba: cannot write")
    assert "use another store" in last


@pytest.mark.parametrize("columns", [80, 60])
def test_the_table_of_status_fits_the_columns_that_there_are(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    long = {**NO, "reason": "test auc 0.5862 of version 1 is more than 0.01 below the baseline's 0.6000 (gate)"}
    finish("store", "kidney-stones-2026-with-a-long-name", recipe("quickstart"), promote=long)
    assert main(["status", "--store", "store"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 8
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize("argv", [["status"], ["predict", "a.png"], ["shards", "names"], ["train", *DRY]], ids=" ".join)
@pytest.mark.parametrize("store", ["file", "file/below"])
def test_a_store_that_is_a_file_is_refused_by_whatever_opens_one(argv, store, capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    line = told(capsys, *argv, "--store", store, code=2)
    assert line.startswith(f"medmamba: --store {store}: {tmp_path / 'file'} is a file, but a store is a folder; give")


def test_a_finished_run_prints_model_and_baselines_and_exits_0(capsys):
    finish("store", "r", recipe("quickstart"))
    assert main(["run", "release", "--recipe", "quickstart", "--run", "r", "--store", "store"]) == 0
    seen = capsys.readouterr()
    assert "12 images in 2 shards (train 10, val 2)" in seen.out
    assert "1 image could not be decoded" in seen.out
    assert "3 trials, 1 stopped early, 1 failed" in seen.out
    assert "winner: train.optim.lr = 0.00235" in seen.out
    assert re.search(r"logistic, pixels +│ 0\.7000 │ 0\.6000", seen.out)
    assert "Only 120 test images" in seen.out
    assert "models:/medmamba-phantoms@champion" in seen.out
    assert [line.split() for line in seen.err.splitlines()[1:]] == [
        [step, "done"] for step in ("shard", "tune", "train", "evaluate", "report", "register", "promote")
    ]


def test_the_results_of_a_finished_run_as_json(capsys):
    finish("store", "r", recipe("quickstart"))
    assert main(["run", "--run", "r", "--store", "store", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["register"]["version"] == 7
    assert list(facts) == ["shard", "tune", "train", "evaluate", "report", "register", "promote"]


def test_a_no_of_the_gate_is_exit_code_3_each_time_it_is_asked(capsys):
    finish("store", "r", recipe("quickstart"), promote=NO)
    for argv in (["run", "release", "--recipe", "quickstart"], ["promote"], ["promote"]):
        assert main([*argv, "--run", "r", "--store", "store"]) == 3
        assert f"not promoted: {NO['reason']}" in capsys.readouterr().err
    assert main(["evaluate", "--run", "r", "--store", "store"]) == 0
    assert main(["promote", "--run", "r", "--store", "store", "--dry-run"]) == 0


def test_a_run_resumes_by_name_with_its_recipe_and_workflow(capsys):
    begun = override(recipe("quickstart"), {"train.epochs": 3, "data.seed": 5})
    finish("store", "mine", begun, workflow="direct", last="evaluate", failing=["train"])
    for verb in ("run", "evaluate", "promote"):
        found = resolved(capsys, verb, "--run", "mine", "--store", "store", "--dry-run")
        assert Recipe.model_validate(found["recipe"]) == begun
        assert found["workflow"] == "direct"
        assert (found["steps"]["shard"], found["steps"]["train"]) == ("done", "failed")


def test_another_value_for_a_begun_run_is_drift_by_field(capsys):
    finish("store", "mine", recipe("quickstart"), workflow="direct")
    argv = ["train", "--run", "mine", "--store", "store", "--train.epochs", "99", "--data.seed", "1"]
    assert "step shard of run 'mine'" in (line := told(capsys, *argv, "--dry-run", code=2))
    assert "seed: 0 -> 1" in line
    line = told(capsys, *argv[:-2], "--dry-run", code=2)
    assert "step train of run 'mine'" in line
    assert "train.epochs: 10 -> 99" in line
    assert "--run NAME" in line


def test_a_sweep_cannot_join_a_finished_training(capsys):
    finish("store", "mine", recipe("quickstart"), workflow="direct")
    line = told(capsys, "run", "release", "--run", "mine", "--store", "store", "--dry-run", code=2)
    assert 'inputs.tune: null -> "still to run"' in line


def test_a_forced_promotion_is_a_step_of_its_own(capsys):
    finish("store", "r", recipe("quickstart"), promote=NO)
    found = resolved(capsys, "promote", "--run", "r", "--store", "store", "--force", "--dry-run")
    assert found["steps"]["promote-forced"] == "to do"


def test_a_damaged_record_of_the_workflow_is_named(capsys):
    open_store("store").at("runs", "r").put(WORKFLOW_FILE, b'{"recipe": {')
    line = told(capsys, "train", "--run", "r", "--store", "store", code=1)
    assert "workflow.json is damaged" in line
    assert "--recipe" in line


@pytest.mark.parametrize(
    "kept",
    ["[]", "null", "7", '"x"', "{}", '{"workflow": "release"}', '{"workflow": "../x", "recipe": {}}', "[" * 100_000,
     '{"workflow": ["release"], "recipe": {}}', '{"workflow": "release", "recipe": []}', "\xff", "\x00"],
    ids=lambda kept: kept[:30],
)  # fmt: skip
@pytest.mark.parametrize(
    "words", [("train", "--run", "r"), ("run", "--recipe", "quickstart", "--run", "r", "--dry-run")]
)
def test_a_workflow_that_cannot_be_is_named(capsys, kept, words):
    open_store("store").at("runs", "r").put(WORKFLOW_FILE, kept.encode("latin-1"))
    line = told(capsys, *words, "--store", "store", code=1)
    assert "workflow.json is damaged" in line


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("record.json", {"facts": []}), ("record.json", {"facts": None}), ("record.json", {"seconds": "long"}),
        ("record.json", {"inputs": {"x": 7}}), ("record.json", {"placement": []}), ("record.json", {"more": 1}),
        ("record.json", {"started": 3}), ("config.json", {"config": []}), ("config.json", {"inputs": ["x"]}),
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_cannot_be_is_named(capsys, key, changes):
    finish("store", "r", recipe("quickstart"), promote=NO)
    step = open_store("store").at("runs", "r", "promote")
    step.put(key, json.dumps({**json.loads(step.get(key)), **changes}).encode())
    line = told(capsys, "promote", "--run", "r", "--store", "store", "--dry-run", code=1)
    assert f"{key} is not a valid step file" in line
    assert "delete the step's folder" in line


@pytest.mark.parametrize("place", ["../../../etc", "/etc", "", "a/../../b", "a\0b", 7, None, ["x"], {}])
def test_a_place_in_a_record_leads_nowhere_outside_the_store(place):
    with pytest.raises(ValueError, match="is not a key"):
        open_store("store").at(place)


def test_the_store_comes_from_the_environment_if_not_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDMAMBA_STORE", str(tmp_path / "elsewhere"))
    assert resolved(capsys, "train", *DRY)["store"] == str(tmp_path / "elsewhere")
    assert resolved(capsys, "train", *DRY, "--store", "here")["store"] == str(tmp_path / "here")


def test_a_ray_job_must_name_its_store(capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "--store" in told(capsys, "train", *DRY, code=2)


def test_datasets_lists_the_sixteen_and_the_phantoms(capsys):
    assert main(["datasets"]) == 0
    text = capsys.readouterr().out
    assert main(["datasets", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert len(cards) == 17
    assert all(re.search(rf"^{re.escape(card['name'])} ", text, re.MULTILINE) for card in cards)


def test_datasets_shows_one(capsys):
    assert main(["datasets", "bloodmnist"]) == 0
    text = capsys.readouterr().out
    assert "Blood cells" in text
    assert "CC BY 4.0" in text
    assert main(["datasets", "bloodmnist", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], len(shown["classes"])) == ("bloodmnist", 8)


def test_status_of_an_empty_store_says_what_to_do(capsys, tmp_path):
    assert main(["status", "--store", str(tmp_path / "none")]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert main(["status", "--store", str(tmp_path / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert not (tmp_path / "none").exists()


def test_status_lists_runs_and_shows_one(capsys):
    finish("store", "one", recipe("quickstart"))
    finish("store", "two", recipe("quickstart"), workflow="direct", last="train")
    assert main(["status", "--store", "store"]) == 0
    assert "medmamba-phantoms version 7" in capsys.readouterr().out
    assert main(["status", "two", "--store", "store", "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == ["shard", "train"]


def run_module(command: str, tmp_path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("medmamba", f"{sys.executable} -m pipelines")],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip


def test_the_module_is_the_command_with_its_exit_code(tmp_path):
    done = run_module("medmamba train --recipe quickstart --train.epochs 0 --dry-run", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "medmamba: train.epochs = 0: Input should be greater than or equal to 1\n"


def test_a_reader_that_has_enough_ends_the_command_quietly(tmp_path):
    done = run_module("medmamba train --help | head -1", tmp_path)
    assert done.stdout == "usage: medmamba train [-h] [OPTIONS]\n"
    assert done.stderr == ""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "argv",
    [
        ["train", *DRY],
        ["train", "--run", "r"],
        ["status"],
        ["predict", "image.png"],
    ],
    ids=" ".join,
)
def test_a_silent_s3_server_is_named_within_15_seconds(argv, capsys, monkeypatch, tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "image.png")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name, value in {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "a",
                            "AWS_SECRET_ACCESS_KEY": "b"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        assert main([*argv, "--store", "s3://bucket/prefix"]) == 1
        assert time.monotonic() - began < 15
    assert "the S3 server cannot be reached" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), SystemExit(0), SystemExit(15)], ids=repr)
def test_what_stops_a_command_is_no_success(stopped, capsys, monkeypatch):
    def stop(argv) -> int:
        raise stopped

    monkeypatch.setitem(VERBS, "datasets", stop)
    assert "interrupted; run the same command to resume" in told(capsys, "datasets", code=1)


def test_forcing_acts_again_where_the_alias_has_gone_elsewhere(capsys, tmp_path):
    store = open_store(str(tmp_path / "store"))
    tracking = open_tracking(store)
    for run, auc in (("strong", 0.9), ("weak", 0.6)):
        facts, verdict = registered.released(store, tracking, run, auc=auc)
        finish("store", run, recipe("quickstart"), register=facts, promote=verdict)
    assert verdict["verdict"] == "no"
    force = ["promote", "--store", "store", "--force", "--json", "--run"]

    def holder() -> int:
        return by_alias(tracking, "medmamba-phantoms", "champion").number

    quiet = registered.context(store, tracking, "weak").show

    def promote(run: str) -> list[str]:
        """As the command would, but that a Ray is connected to."""
        work = read_work(PROMOTE, [*force[1:], run])
        steps = forced_steps(work, "release", work.values)
        made = run_steps(
            steps, store, run, open_context=lambda: registered.context(store, tracking, run, PLACED), show=quiet
        )
        return [state.name for state in made][-1:]

    assert promote("weak") == ["promote-forced"]
    assert (holder(), promote("weak"), holder()) == (2, ["promote-forced"], 2)
    assert promote("strong") == ["promote-forced"]
    assert (holder(), promote("weak"), holder()) == (1, ["promote-forced-2"], 2)
    assert main([*force, "weak"]) == 0
    assert list(json.loads(capsys.readouterr().out))[-1] == "promote-forced-2"
    assert open_store("store").head("runs/weak/promote-forced/record.json"), "the first one stays as it was"


def test_promote_starts_no_ray_and_reports_the_current_alias(capsys, tmp_path):
    store = open_store(str(tmp_path / "store"))
    tracking = open_tracking(store)
    for run, auc in (("first", 0.8), ("second", 0.9)):
        facts = registered.register_run(
            registered.context(store, tracking, run), registered.facts(store, run, auc=auc), "m"
        )
        finish("store", run, recipe("quickstart"), workflow="direct", last="register", register=facts)
        assert main(["promote", "--store", "store", "--run", run]) == 0
        assert read_record(store.at("runs", run, "promote")).placement == {}
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    capsys.readouterr()
    assert main(["promote", "--store", "store", "--run", "first"]) == 0
    seen = capsys.readouterr()
    said = seen.err.splitlines()[-1]
    assert re.match(
        r"decided on \d{4}-\d\d-\d\d \d\d:\d\d UTC: version 1 of m was promoted to champion, replacing no", said
    )
    assert "the alias champion is now at version 2, and this command changed nothing" in said
    assert "decided on 20" in seen.out
    assert main(["promote", "--store", "store", "--run", "first", "--force"]) == 0
    assert by_alias(tracking, "m", "champion").number == 1


def test_a_run_held_by_another_driver_is_refused_unless_finished(capsys):
    finish("store", "r", recipe("quickstart"), last="register")
    with driver_lease(open_store("store"), "r", wait_s=0, say=print):
        assert main(["promote", "--store", "store", "--run", "r", "--wait-s", "0"]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(
            rf"medmamba: run 'r' has been held by process {os.getpid()} on .* since 20.*: wait until", line
        )
        assert main(["register", "--store", "store", "--run", "r"]) == 0
        assert main(["promote", "--store", "store", "--run", "r", "--dry-run"]) == 0
        assert main(["status", "--store", "store"]) == 0
    assert not open_store("store").head("runs/r/promote/config.json")


def test_a_terminated_driver_gives_its_run_back(tmp_path):
    script = (
        "import sys, time\n"
        "from data_shards.store import open_store\n"
        "from pipelines.interrupt import interruptible\n"
        "from pipelines.tracking.leases import driver_lease\n"
        "with interruptible(), driver_lease(open_store(sys.argv[1]), 'r', wait_s=0, say=print):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, "store"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    (key,) = open_store("store").list("leases/")
    assert json.loads(open_store("store").get(key))["is_over"]


def test_a_source_that_is_not_there_binds_no_run(tmp_path, capsys):
    store = tmp_path / "store"
    wrong = ["shard", "--recipe", "breastmnist", "--run", "r", "--store", str(store), "--data.source", "/nowhere.npz"]
    assert main(wrong) == 1
    assert "was not found" in capsys.readouterr().err
    assert not (store / "runs/r").exists()
    assert main([*wrong[:-1], str(tmp_path), "--dry-run"]) == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["submit", "--", "status"],
        ["submit", "--address", "head:6379", "--", "status"],
        ["bench", "--repeats", "0"],
        ["bench", "--out", "nowhere/figures.json"],
        ["bench", "--out", "."],
        ["bench", "--networks", "Z"],
        ["bench", "--backends", "numba", "nunba"],
        ["bench", "--precisions", "float16"],
        ["bench", "--batches", "0"],
        ["bench", "--sides", "64", "16"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_wrong_use_at_once(argv, capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_bench_prints_json_and_nothing_else(capsys):
    assert main(["bench", "--repeats", "1", "--batches", "2", "--sides", "32", "--networks", "nano", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert "numba" in {row["case"]["backend"] for row in rows}
    for row in rows:
        assert row["train_images_per_s"] > 0
        assert row["train_megapixels_per_s"] == pytest.approx(row["train_images_per_s"] * 32 * 32 / 1e6)
        assert 0 < row["scan_share"] < 1
        assert max(row["errors"].values()) < 1e-5


def test_bench_measures_what_it_can_and_fails_if_nothing(capsys):
    few = ["bench", "--repeats", "1", "--sides", "32", "--backends", "cuda"]
    assert main([*few, "numba", "--batches", "2", "2", "--out", "figures.json"]) == 0
    seen = capsys.readouterr().out
    assert "nano cuda, batch 2, 32 px, fp32: not measured: backend cuda: it requires a CUDA device" in seen
    why_not = {row["case"]["backend"]: row["why_not"] for row in json.loads(Path("figures.json").read_text())["rows"]}
    assert why_not == {"cuda": "backend cuda: it requires a CUDA device", "numba": ""}
    assert main([*few, "--batches", "2"]) == 1
    assert "Speed" not in capsys.readouterr().out


def test_an_interrupted_bench_keeps_the_rows_that_it_has(capsys, monkeypatch):
    # The second row sends the signal of a Ctrl-C to this process.
    measure = pipelines.bench.measure.measure_alone

    def interrupted(case, *, repeats):
        if case.batch == 3:
            signal.raise_signal(signal.SIGINT)
        return measure(case, repeats=repeats)

    monkeypatch.setattr(pipelines.bench.measure, "measure_alone", interrupted)
    few = ["bench", "--repeats", "1", "--sides", "32", "--backends", "numba", "--out", "kept.json", "--batches"]
    assert main([*few, "3"]) == 1
    assert json.loads(Path("kept.json").read_text())["rows"] == []
    capsys.readouterr()
    assert main([*few, "2", "3"]) == 1
    seen = capsys.readouterr()
    assert "bench: interrupted after 1 of 2 rows" in seen.err
    assert "nano numba" in seen.out
    assert [row["case"]["batch"] for row in json.loads(Path("kept.json").read_text())["rows"]] == [2]


def test_the_table_of_bench_fits_80_columns_a_line_to_a_row(capsys, monkeypatch):
    names = [("T", "cuda"), ("T", "mamba_ssm"), *((network, "") for network in COMPARED)]
    cases = [Case(network, 128, 224, "bfloat16", scan, "cuda", False) for network, scan in names]
    figures = Row(cases[0], 2431.4, 122.0, 10625.1, 12.34, 17.83, 1348, 0.42)
    monkeypatch.setattr(terminal, "console", lambda: Console(width=80))
    terminal.table("Speed", *_speed_table([replace(figures, case=case) for case in cases]))
    _, *header, ruler = capsys.readouterr().out.splitlines()[:4]
    assert "Mpx/s" in header[1]
    monkeypatch.setattr(terminal, "console", lambda: Console(width=200))
    terminal.table("Speed", *_speed_table([replace(figures, case=case) for case in cases]))
    assert capsys.readouterr().out.splitlines()[3] == ruler, "narrower than it wants to be: rows are folded"


def test_an_unforeseen_error_is_one_line_that_names_its_log(capsys, monkeypatch, tmp_path):
    def breaks(argv) -> int:
        raise ZeroDivisionError("ours")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(VERBS, "status", breaks)
    assert main(["status"]) == 1
    line, named = capsys.readouterr().err.splitlines()
    assert line == "medmamba: unexpected ZeroDivisionError: ours; if it happens again, report it as a bug"
    kept = Path(named.removeprefix("details: ")).read_text()
    assert kept.startswith("Traceback")
    assert kept.endswith("ZeroDivisionError: ours\n")


def test_status_and_dry_run_show_a_refused_steps_reason(capsys):
    finish("store", "half", recipe("quickstart"), workflow="direct", last="evaluate", failing=["train"])
    assert main(["status", "half", "--store", "store", "--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["step"] == "train"]
    assert (row["state"], row["told"]) == ("failed", "stopped by the test")
    assert main(["run", "--run", "half", "--store", "store", "--dry-run"]) == 0
    assert "failed: stopped by the test" in capsys.readouterr().out


def test_a_time_limit_counts_from_the_start_of_the_command():
    work = read_work(TRAIN, [*DRY, "--max-minutes", "2"])
    assert time_is_up(work) == BEGAN + 120
    assert time_is_up(read_work(TRAIN, [*DRY])) == 0
    assert time_is_up(read_work(PROMOTE, [*DRY])) == 0


def test_a_training_out_of_time_exits_0_and_says_how_it_resumes(capsys, monkeypatch):
    def ends(argv):
        raise Paused("the time of --max-minutes is up")

    monkeypatch.setitem(VERBS, "train", ends)
    assert told(capsys, "train", code=0) == "medmamba: the time of --max-minutes is up"
