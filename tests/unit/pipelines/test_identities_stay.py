"""Runs that earlier code began: their records must stay readable, and their trainings and sweeps must resume.

Settings are written as users write them, in dotted keys. earlier_runs.json holds what earlier code wrote into a store.
Renaming a module, a function or a setting is not a reason to change a digest or that file: only the imports below may
then change, and an old word keeps its meaning.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_shards.plan import config_digest
from data_shards.renamed import stored_values
from data_shards.store import open_store
from medmamba.checkpoint import description, model_digest, parse_description
from medmamba.config import MedMambaConfig
from pipelines.cli import main
from pipelines.flow import DriftError, plan_steps
from pipelines.override import difference, flatten, override
from pipelines.recipes import RECIPES, Recipe, recipe
from pipelines.steps.search import TuneStepConfig, search_space
from pipelines.sweep.ledger import Ledger
from pipelines.sweep.suggestion import misfit
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.state import described_bytes, read_described, state_of, training_digest
from pipelines.workflows import WORKFLOWS

DIGITS = 16
EARLIER = json.loads((Path(__file__).parent / "earlier_runs.json").read_text())

TRAININGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "recipe quickstart": ("quickstart", {}, "59da8e95b4e1c40c"),
    "recipe breastmnist": ("breastmnist", {}, "1fd082d2dcc03c32"),
    "recipe pneumoniamnist": ("pneumoniamnist", {}, "a806ea59b4b412e4"),
    "recipe bccd": ("bccd", {}, "5b7010e25d04f495"),
    "recipe paper-medmnist": ("paper-medmnist", {}, "846cc0e7edee96b4"),
    "recipe paper": ("paper", {}, "8faacc9275a8ab81"),
    "model.variant": ("quickstart", {"model.variant": "T"}, "366fb6c850117112"),
    "model.num_classes": ("quickstart", {"model.num_classes": 5}, "1a72a3b2a664c69c"),
    "model.drop_path": ("quickstart", {"model.drop_path": 0.25}, "d0e03f55d7d0db31"),
    "model.branches": ("quickstart", {"model.branches": "scan"}, "b8dbda08e404e11f"),
    "model.dims": ("quickstart", {"model.dims": [16, 32], "model.depths": [1, 1]}, "72b21c41cde7b639"),
    "model.depths": ("quickstart", {"model.depths": [1, 2, 2, 1]}, "9f868459f1556d0b"),
    "model.d_state": ("quickstart", {"model.d_state": 8}, "0200dec1d343d3f8"),
    "train.epochs": ("quickstart", {"train.epochs": 7}, "106ef1015a0b8e9b"),
    "train.batch_size": ("quickstart", {"train.batch_size": 64}, "5d115a7219772b4b"),
    "train.micro_batch": ("quickstart", {"train.micro_batch": 8}, "1d3851c5456f6637"),
    "train.image_size": ("quickstart", {"train.image_size": 96}, "a43e7433d8f65779"),
    "train.precision": ("quickstart", {"train.precision": "bfloat16"}, "afc427369eea3d0b"),
    "train.seed": ("quickstart", {"train.seed": 5}, "668e6ef3626fa27b"),
    "train.init": ("quickstart", {"train.init": "a" * 64}, "18a6189c0ad4dae2"),
    "train.class_weights": ("quickstart", {"train.class_weights": True}, "ce068d923de7a8f7"),
    "train.sampling": ("quickstart", {"train.sampling": "balanced"}, "d6b3e32433eff427"),
    "train.label_smoothing": ("quickstart", {"train.label_smoothing": 0.1}, "f4a23f33f59d8e24"),
    "train.patience": ("quickstart", {"train.patience": 4}, "82426787dea60588"),
    "train.optim.lr": ("quickstart", {"train.optim.lr": 0.0003}, "aa2d1f8b5a670dfe"),
    "train.optim.weight_decay": ("quickstart", {"train.optim.weight_decay": 0.05}, "aaa41b94bdaed42e"),
    "train.optim.betas": ("quickstart", {"train.optim.betas": [0.8, 0.95]}, "b71fc07b21f29638"),
    "train.optim.eps": ("quickstart", {"train.optim.eps": 1e-06}, "416062ccb0563b74"),
    "train.optim.schedule": ("quickstart", {"train.optim.schedule": "step"}, "4960e8275335fbbc"),
    "train.optim.warmup_epochs": ("quickstart", {"train.optim.warmup_epochs": 2.5}, "0a3eb933b8f7494a"),
    "train.optim.milestones": ("quickstart", {"train.optim.milestones": [3, 6]}, "74f514b6bf348ab5"),
    "train.optim.gamma": ("quickstart", {"train.optim.gamma": 0.5}, "f0c1af3b37b7f0d7"),
    "train.optim.final_lr_fraction": ("quickstart", {"train.optim.final_lr_fraction": 0.1}, "88567b457d760a55"),
    "train.optim.clip_norm": ("quickstart", {"train.optim.clip_norm": 0}, "3691ab620b206d7b"),
    "train.optim.layer_decay": ("quickstart", {"train.optim.layer_decay": 0.75}, "e5c360ca52af23e6"),
    "train.augment.crop": ("quickstart", {"train.augment.crop": 0.5}, "44701e23d2b50f7b"),
    "train.augment.hflip": ("quickstart", {"train.augment.hflip": 0}, "baeb89abe41227f8"),
    "train.augment.vflip": ("quickstart", {"train.augment.vflip": 0.5}, "785da274e4af348a"),
    "train.augment.rot90": ("quickstart", {"train.augment.rot90": True}, "fa9e087a798c82dd"),
    "train.augment.translate": ("quickstart", {"train.augment.translate": 0.2}, "11f12f8ea2ebf65d"),
    "train.augment.scale": ("quickstart", {"train.augment.scale": 0.05}, "33009fdf12926a3d"),
    "train.augment.rotate": ("quickstart", {"train.augment.rotate": 30.0}, "08bf5214feb5152a"),
    "train.augment.brightness": ("quickstart", {"train.augment.brightness": 0.2}, "38e835f5a6cc3ecb"),
    "train.augment.contrast": ("quickstart", {"train.augment.contrast": 0.3}, "d5c733d3ea6e387c"),
    "train.augment.erase": ("quickstart", {"train.augment.erase": 0.25}, "8d824bde0b64195b"),
    "train.augment.pad_crop": ("quickstart", {"train.augment.pad_crop": 4}, "1824a5f302b460d8"),
    "train.augment.padding": ("quickstart", {"train.augment.padding": "zeros"}, "c6799ab9a717f938"),
    "train.augment.saturation": ("quickstart", {"train.augment.saturation": 0.1}, "71e7341b0a5359af"),
    "train.augment.hue": ("quickstart", {"train.augment.hue": 0.05}, "24288f8de3e1f4c2"),
    "train.augment.augmix": ("quickstart", {"train.augment.augmix": 0.5}, "6e4f3fde987db29e"),
    "train.freeze": (
        "quickstart",
        {"train.init": "b" * 64, "train.freeze": ["patch_embed.*", "layers.0.*"]},
        "aaa2d164610ace6e",
    ),
    "tf32": ("paper", {"train.precision": "tf32"}, "99c493d3116b3031"),
}
"""Recipe, changes of it, and the digest in train.json that a resumed training must have."""

DATA = {
    "quickstart": "6e583655e69aee95",
    "breastmnist": "4d9dcf1abc945958",
    "pneumoniamnist": "04b3b88b3614d71e",
    "bccd": "c066aead0689ae96",
    "paper-medmnist": "3293da3fa002d1e9",
    "paper": "b55f9d70941139d1",
}
"""Recipe -> the digest of its settings, as in the manifest of its dataset."""

SPACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recipe": (
        {},
        {
            "train.optim.lr": [0.001, 0.006, True],
            "train.optim.weight_decay": [0.001, 0.1, True],
            "model.drop_path": [0.0, 0.3, False],
            "train.batch_size": [16, 32],
        },
    ),
    "tune.space.lr": (
        {"tune.space.lr": [0.0001, 0.01]},
        {
            "train.optim.lr": [0.0001, 0.01, True],
            "train.optim.weight_decay": [0.001, 0.1, True],
            "model.drop_path": [0.0, 0.3, False],
            "train.batch_size": [16, 32],
        },
    ),
    "tune.space.weight_decay": (
        {"tune.space.weight_decay": [0.0001, 0.001]},
        {
            "train.optim.lr": [0.001, 0.006, True],
            "train.optim.weight_decay": [0.0001, 0.001, True],
            "model.drop_path": [0.0, 0.3, False],
            "train.batch_size": [16, 32],
        },
    ),
    "tune.space.drop_path": (
        {"tune.space.drop_path": [0.1, 0.2]},
        {
            "train.optim.lr": [0.001, 0.006, True],
            "train.optim.weight_decay": [0.001, 0.1, True],
            "model.drop_path": [0.1, 0.2, False],
            "train.batch_size": [16, 32],
        },
    ),
    "tune.space.batch_size": (
        {"tune.space.batch_size": [16, 48, 64]},
        {
            "train.optim.lr": [0.001, 0.006, True],
            "train.optim.weight_decay": [0.001, 0.1, True],
            "model.drop_path": [0.0, 0.3, False],
            "train.batch_size": [16, 48, 64],
        },
    ),
    "only batches": (
        {
            "tune.space.lr": [],
            "tune.space.weight_decay": [],
            "tune.space.drop_path": [],
            "tune.space.batch_size": [32, 64],
        },
        {"train.batch_size": [32, 64]},
    ),
}
"""Changes of the quickstart, and what is searched: [low, high, whether logarithmic], or the choices."""

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "finished": (
        "direct",
        "quickstart",
        {
            "data.phantoms.num_patients": 60,
            "data.phantoms.images_per_patient": 2,
            "data.phantoms.side": 32,
            "data.samples_per_shard": 20,
            "train.image_size": 32,
            "train.batch_size": 8,
            "train.micro_batch": 4,
            "evaluate.baseline_side": 16,
            "gate.beats_baseline": False,
            "train.epochs": 8,
        },
    ),
    "interrupted": (
        "release",
        "quickstart",
        {
            "data.phantoms.num_patients": 60,
            "data.phantoms.images_per_patient": 2,
            "data.phantoms.side": 32,
            "data.samples_per_shard": 20,
            "train.image_size": 32,
            "train.batch_size": 8,
            "train.micro_batch": 4,
            "evaluate.baseline_side": 16,
            "gate.beats_baseline": False,
            "tune.trials": 4,
            "tune.epochs": 5,
            "tune.space.batch_size": [8, 16],
        },
    ),
    "begun": (
        "direct",
        "quickstart",
        {
            "data.phantoms.num_patients": 60,
            "data.phantoms.images_per_patient": 2,
            "data.phantoms.side": 32,
            "data.samples_per_shard": 20,
            "train.image_size": 32,
            "train.batch_size": 8,
            "train.micro_batch": 4,
            "evaluate.baseline_side": 16,
            "gate.beats_baseline": False,
            "train.epochs": 6,
        },
    ),
    "elsewhere": (
        "release",
        "paper",
        {
            "data.dataset": "skin",
            "data.layout": "csv",
            "data.source": "/images/skin",
            "data.csv": "labels.csv",
            "data.class_map": ["bkl=benign"],
            "data.drop_classes": ["vasc"],
            "data.group_column": "patient",
            "data.split_values": ["1=train", "0=test"],
            "data.split_column": "fold",
            "data.leaks.across": "move",
            "data.dicom.window": [-600, 1500],
            "data.dicom.identifying": "keep",
            "data.max_side": 512,
            "model.variant": "S",
            "train.init": "c" * 64,
            "train.freeze": ["patch_embed.*"],
            "train.sampling": "balanced",
            "train.optim.layer_decay": 0.75,
            "train.augment.augmix": 0.5,
            "tune.trials": 12,
            "tune.epochs": 9,
            "tune.grace_epochs": 2,
            "tune.reduction_factor": 4,
            "tune.seed": 3,
            "tune.space.batch_size": [64, 128],
            "evaluate.micro_batch": 32,
            "evaluate.baseline_samples": 100,
            "registry.model": "skin-model",
            "gate.alias": "candidate",
            "gate.metric": "balanced_accuracy",
            "gate.minimum": 0.7,
        },
    ),
}
"""Run in earlier_runs.json -> its workflow, recipe and changes."""

WORDS = """
run release --recipe paper-medmnist --run words --data.dataset skin --data.name two --data.layout csv --data.source
SOURCE --data.classes benign mel --data.drop-classes vasc df --data.class-map bkl=benign nv=benign --data.task
multilabel --data.no-finding none --data.csv labels.csv --data.image-column path --data.label-column dx
--data.label-separator ; --data.group-column patient --data.split-column fold --data.split-values 1=train 0=test
--data.split-folders ignore --data.rows-without-file drop --data.val-fraction 0.1 --data.test-fraction 0.25
--data.seed 4 --data.salt pepper --data.max-side 512 --data.max-quarantine 0.05 --data.samples-per-shard 900
--data.shard-bytes 1000000 --data.leaks.near 6 --data.leaks.across move --data.leaks.within drop --data.leaks.labels
refuse --data.leaks.datasets off --data.dicom.frames first --data.dicom.window -600 1500 --data.dicom.view 1
--data.dicom.identifying keep --data.dicom.objects keep --model.variant S --model.drop-path 0.2 --model.branches both
--model.depths 1 1 2 1 --model.d-state 8 --train.epochs 30 --train.batch-size 64 --train.micro-batch 16
--train.image-size 96 --train.precision tf32 --train.seed 3 --train.class-weights --train.label-smoothing 0.1
--train.patience 5 --train.optim.lr 0.001 --train.optim.betas 0.8 0.95 --train.optim.weight-decay 0.03
--train.optim.eps 1e-7 --train.optim.final-lr-fraction 0.2 --train.optim.layer-decay 0.9 --train.augment.hflip 0.25
--train.augment.translate 0.2 --train.augment.scale 0.2 --train.augment.brightness 0.3 --train.augment.contrast 0.2
--train.augment.erase 0.1 --train.augment.saturation 0.2 --train.augment.hue 0.05 --train.sampling shuffled
--model.kind medmamba --data.phantoms.num-patients 90 --data.phantoms.images-per-patient 3 --data.phantoms.side 48
--data.phantoms.speckle 0.4 --data.phantoms.contrast 0.3 0.7 --train.optim.schedule step --train.optim.milestones 10
20 --train.optim.gamma 0.2 --train.optim.clip-norm 0 --train.optim.warmup-epochs 1 --train.augment.crop 0.5
--train.augment.vflip 0.5 --train.augment.rot90 --train.augment.rotate 20 --train.augment.padding zeros
--train.augment.pad-crop 2 --train.augment.augmix 0.1 --tune.trials 6 --tune.epochs 4 --tune.grace-epochs 2
--tune.reduction-factor 2 --tune.seed 1 --tune.space.lr 0.0001 0.01 --tune.space.weight-decay 0.001 0.1
--tune.space.drop-path 0.05 0.2 --tune.space.batch-size 32 64 --evaluate.micro-batch 16 --evaluate.baseline-side 16
--evaluate.baseline-samples 500 --registry.model skin-model --gate.alias candidate --gate.metric f1 --gate.minimum 0.5
--gate.no-beats-baseline --placement.workers 1 --placement.device cpu --placement.cpus-per-worker 1
--placement.zero-stage 2 --placement.compile off --placement.scan reference --placement.trials 1 --placement.cache-gib
2 --placement.checkpoint-minutes 3 --placement.checkpoint-steps 7 --placement.stall-minutes 4 --placement.patience-s
60
"""
"""A command line with nearly every key; WORDS_MEAN are the digests of what it asks for."""
WORDS_MEAN = {
    "data": "18a9710e6cd27310",
    "training": "16c9c803f384916e",
    "space": "bce5e818e2895d5c",
    "placement": (1, 2, 7),
}


def training(made: Recipe) -> TrainStepConfig:
    return TrainStepConfig(model=made.model, train=made.train)


def digest(config: TrainStepConfig) -> str:
    return training_digest(config.with_classes(config.model.num_classes or 3))[:DIGITS]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_of_earlier_code_is_the_same_training(name):
    base, changes, expected = TRAININGS[name]
    assert digest(training(override(recipe(base), changes))) == expected


def test_each_setting_of_a_training_is_among_them():
    changed: set[str] = set()
    for base, changes, _ in TRAININGS.values():
        plain, other = (training(made).model_dump() for made in (recipe(base), override(recipe(base), changes)))
        changed |= difference(plain, other).keys()
    assert set(flatten(training(Recipe()).model_dump())) - changed == {"model.kind"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_dataset_of_a_recipe_is_the_same(name):
    assert config_digest(recipe(name).data)[:DIGITS] == DATA[name]


@pytest.mark.parametrize("name", SPACES)
def test_a_sweep_searches_the_same_space(name):
    changes, expected = SPACES[name]
    assert space_of(override(recipe("quickstart"), changes)) == expected


def sweep(made: Recipe) -> TuneStepConfig:
    return TuneStepConfig(start=training(made), tune=made.tune)


def space_of(made: Recipe) -> dict[str, Any]:
    drawn = search_space(sweep(made)).items()
    return {key: list(d.choices) if hasattr(d, "choices") else [d.low, d.high, d.log] for key, d in drawn}


@pytest.fixture
def store(tmp_path):
    """A store with the records of all earlier runs."""
    found = open_store(str(tmp_path / "store"))
    for key, text in EARLIER["store"].items():
        found.put(key, text.encode())
    return found


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_earlier_code_has_not_drifted(run, store):
    workflow, base, changes = RUNS[run]
    states = plan_steps(WORKFLOWS[workflow](override(recipe(base), changes)), store, run)
    assert {state.name: state.state for state in states} == EARLIER["states"][run]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("key", ["data.seed", "train.seed"])
def test_another_value_is_drift(run, key, store):
    workflow, base, changes = RUNS[run]
    changed = override(recipe(base), {**changes, key: 99})
    with pytest.raises(DriftError, match=r"seed: \d+ -> 99"):
        plan_steps(WORKFLOWS[workflow](changed), store, run)


NEW_WORDS = {
    "data.layout": ("data.layout", "table"),
    "data.csv": ("data.table", "labels.csv"),
    "data.leaks.across": ("data.duplicates.across", "move"),
}
"""Key of RUNS -> the key and the value in the words of this release."""


def test_a_run_asked_for_in_new_words_has_not_drifted(store):
    workflow, base, changes = RUNS["elsewhere"]
    renamed = dict(NEW_WORDS.get(key, (key, value)) for key, value in changes.items())
    assert renamed.keys() != changes.keys()
    states = plan_steps(WORKFLOWS[workflow](override(recipe(base), renamed)), store, "elsewhere")
    assert {state.name: state.state for state in states} == EARLIER["states"]["elsewhere"]


def test_drift_of_a_run_of_earlier_code_is_told_in_new_words(store):
    workflow, base, changes = RUNS["elsewhere"]
    other = {**changes, "data.duplicates.across": "drop", "data.dicom.identifying": "quarantine", "data.table": "x.csv"}
    del other["data.leaks.across"], other["data.csv"]
    with pytest.raises(DriftError) as refused:
        plan_steps(WORKFLOWS[workflow](override(recipe(base), other)), store, "elsewhere")
    told = str(refused.value)
    assert 'duplicates.across: "move" -> "drop"' in told
    assert 'dicom.identifying: "keep" -> "quarantine"' in told
    assert 'table: "labels.csv" -> "x.csv"' in told
    assert "leaks" not in told


def test_the_recipe_of_a_run_is_stored_in_old_words():
    made = override(recipe("quickstart"), {"data.duplicates.near": 3, "data.layout": "table"})
    stored = stored_values(made)["data"]
    assert (stored["leaks"]["near"], stored["csv"], stored["layout"]) == (3, "", "csv")
    assert not {"duplicates", "table"} & stored.keys()
    assert Recipe.model_validate(stored_values(made)) == made


def test_a_run_of_earlier_code_keeps_its_recipe(store, capsys):
    assert main(["run", "--run", "finished", "--store", store.uri, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == EARLIER["states"]["finished"]


def test_the_words_of_the_command_line_keep_their_meaning(tmp_path, capsys):
    line = [str(tmp_path) if word == "SOURCE" else word for word in WORDS.split()]
    assert main([*line, "--store", str(tmp_path / "store"), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert meaning(Recipe.model_validate(told["recipe"]), told["placement"]) == WORDS_MEAN


def test_new_words_on_the_command_line_mean_the_same(tmp_path, capsys):
    new = WORDS.replace("--data.layout csv", "--data.layout table").replace("--data.csv", "--data.table")
    new = new.replace("--data.leaks.", "--data.duplicates.").replace(
        "--placement.trials", "--placement.concurrent-trials"
    )
    line = [str(tmp_path) if word == "SOURCE" else word for word in new.split()]
    assert main([*line, "--store", str(tmp_path / "store"), "--dry-run", "--json"]) == 0
    found = capsys.readouterr()
    told = json.loads(found.out)
    assert meaning(Recipe.model_validate(told["recipe"]), told["placement"]) == WORDS_MEAN
    assert found.err == ""


def meaning(made: Recipe, placement: dict[str, Any]) -> dict[str, Any]:
    space = hashlib.sha256(json.dumps(sorted(space_of(made).items())).encode()).hexdigest()[:DIGITS]
    return {
        "data": config_digest(made.data)[:DIGITS],
        "training": digest(training(made)),
        "space": space,
        "placement": (placement["workers"], placement["zero_stage"], placement["checkpoint_steps"]),
    }


def test_the_trials_of_an_earlier_sweep_are_kept(store):
    told: list[str] = []
    made = override(recipe(RUNS["interrupted"][1]), RUNS["interrupted"][2])
    fits = partial(misfit, space=search_space(sweep(made)), trials=made.tune.trials, epochs=made.tune.epochs)
    ledger = Ledger(store.at("runs", "interrupted", "tune"))
    ledger.read(fits, told.append)
    assert not told
    assert [(r.number, r.state, len(r.epochs)) for r in ledger.records()] == [tuple(row) for row in EARLIER["trials"]]


def test_the_checkpoint_of_an_earlier_training_is_read():
    data = EARLIER["train.json"].encode()
    described = read_described(data)
    made = override(recipe(RUNS["begun"][1]), RUNS["begun"][2])
    assert described["training"] == training_digest(training(made).with_classes(3))
    assert described["manifest"] == json.loads(EARLIER["store"]["runs/begun/train/config.json"])["inputs"]["shard"]
    state = state_of(described)
    assert (state.epoch, state.step, state.consumed, len(state.history)) == (2, 21, 24, 2)
    rest = {name: value for name, value in described.items() if name != "digest"}
    assert json.loads(described_bytes(rest)) == json.loads(data)


def test_the_model_of_an_earlier_training_is_the_same_model():
    text = EARLIER["model.json"].encode()
    config, card = parse_description(text, where="model.json")
    assert json.loads(description(config, card)) == json.loads(text)
    assert config == MedMambaConfig(variant="nano", num_classes=3)
    assert model_digest(b"weights", text)[:DIGITS] == "72b5b9b2af12008c"
