"""Where a training's weights are found, what is refused, and that their digest is what a run is known by."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import registered
import torch
from finished_run import finish
from pydantic import ValidationError

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store
from medmamba.checkpoint import export_upstream, load_model, save_model
from medmamba.config import MedMambaConfig
from medmamba.finetune import HEAD
from medmamba.model import build_model
from pipelines.cli import main
from pipelines.commands.work.begun import WORKFLOW_FILE
from pipelines.flow import DriftError
from pipelines.flow.record import to_json
from pipelines.initial_weights import begin_from, find_weights, kept_uri, weights_of_run
from pipelines.override import override
from pipelines.recipes import recipe
from pipelines.steps.context import StepContext
from pipelines.tracking import open_tracking
from pipelines.tracking.registry import IntegrityError, by_number, move_alias
from pipelines.worker.checkpoint.initial import read_kept
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.workflows import WORKFLOWS

MODEL = "medmamba-phantoms"
QUICK = recipe("quickstart")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with the run `old`, whose model lies where a training leaves it."""
    monkeypatch.chdir(tmp_path)
    store = open_store(str(tmp_path / "store"))
    registered.facts(store, "old", auc=0.9)
    return store


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(store, MLflow) with two versions of a model, of other weights; the first is the champion."""
    store = open_store(str(tmp_path_factory.mktemp("released")))
    tracking = open_tracking(store)
    registered.released(store, tracking, "first", auc=0.9)
    before = registered.facts(store, "second", auc=0.8)
    save_network(store.path("runs/second/train/model"), seed=7)
    before["train"]["digest"] = find_weights("runs/second/train/model", store).digest
    registered.register_run(registered.context(store, tracking, "second"), before)
    return store, tracking


@pytest.fixture
def models(released, tmp_path, monkeypatch):
    """The same, with the alias where it was; a test has a folder of its own to work in."""
    monkeypatch.chdir(tmp_path)
    move_alias(released[1], by_number(released[1], MODEL, 1), "champion")
    return released


def save_network(folder: Path, *, seed: int = 7, classes=registered.CLASSES, **card) -> Path:
    torch.manual_seed(seed)
    config = MedMambaConfig(variant="nano", num_classes=len(classes))
    described = {"classes": list(classes), "task": "multiclass", "image_size": 64, "channels": 1, **card}
    save_model(folder, build_model(config), config, card=described)
    return folder


def started(source: str, **changes):
    return override(QUICK, {"train.init": source, **changes})


def test_a_folder_a_file_and_a_stored_model_are_found(store, tmp_path):
    shutil.copytree(store.path("runs/old/train/model"), "copy")
    model, config, card = load_model(Path("copy"))
    export_upstream(model, Path("nano.pth"))
    inside = find_weights("runs/old/train/model", store)
    assert (inside.uri, inside.config, inside.card) == (f"{store.uri}/runs/old/train/model", config, card)
    beside = find_weights("./copy", store)
    assert (beside.uri, beside.digest) == (str(tmp_path / "copy"), inside.digest)
    assert find_weights("copy/weights.safetensors", store) == beside
    upstream = find_weights("nano.pth", store)
    assert (upstream.uri, upstream.card, upstream.config.variant) == (str(tmp_path / "nano.pth"), {}, "nano")
    assert upstream.config.num_classes == 3


def test_equal_tensors_have_one_digest_wherever_the_file_is(store):
    model, _, _ = load_model(store.path("runs/old/train/model"))
    for name in ("a.pth", "b.pth"):
        export_upstream(model, Path(name))
    shutil.copy("a.pth", "c.pth")
    assert len({find_weights(name, store).digest for name in ("a.pth", "b.pth", "c.pth")}) == 1


def test_a_registered_model_is_the_version_its_alias_has_now(models):
    store, tracking = models
    first = find_weights(f"models:/{MODEL}@champion", store)
    assert first.uri == f"models:/{MODEL}/1"
    assert first.digest == find_weights("runs/first/train/model", store).digest
    move_alias(tracking, by_number(tracking, MODEL, 2), "champion")
    second = find_weights(f"models:/{MODEL}@champion", store)
    assert (second.uri, second.digest) == (f"models:/{MODEL}/2", find_weights("runs/second/train/model", store).digest)
    assert second.digest != first.digest
    assert find_weights(f"models:/{MODEL}/1", store) == first


def test_a_registered_model_with_replaced_files_is_not_used(models):
    store, _ = models
    files = sorted(Path(store.uri).glob("mlflow-artifacts/**/weights.safetensors"))
    before = {path: path.read_bytes() for path in files}
    try:
        for path, data in before.items():
            path.write_bytes(data[:-4] + b"\0\0\0\0")
        with pytest.raises(IntegrityError, match=f"the files of models:/{MODEL}/2 have the digest"):
            find_weights(f"models:/{MODEL}/2", store)
    finally:
        for path, data in before.items():
            path.write_bytes(data)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere", "no weights found at nowhere or {store}/nowhere; give a folder with weights.safetensors"),
        ("/nowhere/at/all.pth", "no weights found at /nowhere/at/all.pth; give"),
        ("empty", "no weights found at empty or"),
        ("half", "has a model.json but no weights.safetensors"),
        ("text.pth", "text.pth: cannot be read as tensors"),
        ("models:medmamba", "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        (f"models:/{MODEL}/latest", "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        (f"models:/{MODEL}@best", f"no such model version (it has version 1, 2 of {MODEL})"),
        (f"models:/{MODEL}/3", f"no such model version (it has version 1, 2 of {MODEL})"),
        ("models:/other@champion", "no such model version (it has no model other)"),
        ("http://host/model", "is not a store"),
    ],
)
def test_absent_or_unusable_weights_are_reported_before_any_work(source, told, models):
    store, _ = models
    Path("empty").mkdir()
    Path("half").mkdir()
    Path("half/model.json").write_text("{}")
    Path("text.pth").write_text("no tensors")
    with pytest.raises(ValueError, match=re.escape(told.format(store=store.uri))):
        find_weights(source, store)


def test_a_dry_run_looks_for_the_weights(store, capsys):
    argv = ["train", "--recipe", "quickstart", "--store", store.uri, "--dry-run", "--json", "--train.init"]
    assert main([*argv, "runs/old/train/model"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith(f"train.init is {store.uri}/runs/old/train/model (weights ")
    assert main([*argv, "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("medmamba: train.init nowhere: no weights found at nowhere or")
    assert list(store.list("weights/")) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--train.init", "models:/nothing@champion"], "has no such model version"),
        (["--train.init", "runs/old/train/model", "--model.variant", "T"], "has another network than the recipe"),
        (
            ["--train.init", "runs/old/train/model", "--train.freeze", "layer.0.*"],
            "does not match the name of any parameter",
        ),
        (["--train.init", "runs/old/train/model", "--train.freeze", "*"], "leaves nothing to train"),
        (["--train.freeze", "head.*"], "without init would freeze random weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_weights_and_patterns_that_cannot_be_meant_are_wrong_use(options, line, store, capsys):
    assert main(["train", "--recipe", "quickstart", "--store", store.uri, "--dry-run", *options]) == 2
    seen = capsys.readouterr()
    assert line in seen.err
    assert seen.out == ""


def test_unmatched_networks_and_patterns_name_the_helpful_option(store):
    large = started("runs/old/train/model", **{"model.variant": "T"})
    with pytest.raises(ValueError, match=r"has another network than the recipe: .* use --model\.variant nano"):
        weights_of_run(large, store, "r")
    odd = started("runs/old/train/model", **{"train.freeze": ("layer.0.*",)})
    with pytest.raises(ValueError, match=r"train\.freeze 'layer\.0\.\*' does not match the name of any parameter"):
        weights_of_run(odd, store, "r")
    assert weights_of_run(QUICK, store, "r") is None
    with pytest.raises(ValidationError, match=r"freeze .* without init would freeze random weights"):
        TrainConfig(freeze=("head.*",))


def pinned(values, weights):
    """The recipe as the command runs it."""
    return values.starting_from(weights.digest) if weights else values


def steps(values, store, run="r") -> dict:
    """Name -> configuration of the steps that train."""
    found = WORKFLOWS["release"](pinned(values, weights_of_run(values, store, run)))
    return {step.name: step.config.model_dump() for step in found if step.name in ("tune", "train")}


def test_weights_are_identified_by_digest_not_by_place(store):
    shutil.copytree(store.path("runs/old/train/model"), "copy")
    save_network(Path("other"))
    here, there, other = (steps(started(name), store) for name in ("runs/old/train/model", "copy", "other"))
    assert here == there
    assert here["train"]["train"]["init"] == here["tune"]["start"]["train"]["init"] != other["train"]["train"]["init"]
    assert len(here["train"]["train"]["init"]) == 64
    random = WORKFLOWS["release"](QUICK)
    assert [step.config for step in WORKFLOWS["release"](pinned(QUICK, None))] == [step.config for step in random]


def begun(store, values, run="mine", **finished) -> None:
    """A run whose training is done, begun with the weights that `values` names now."""
    found = weights_of_run(values, store, run)
    found.keep(store)
    finish(store.uri, run, pinned(values, found), workflow="direct", last="train", **finished)
    kept = {"workflow": "direct", "recipe": values.model_dump(mode="json")}
    store.at("runs", run).put(WORKFLOW_FILE, to_json(kept))


def dry(capsys, store, *more: str, code: int = 0):
    assert main(["train", "--run", "mine", "--store", store.uri, "--dry-run", "--json", *more]) == code
    seen = capsys.readouterr()
    return json.loads(seen.out) if code == 0 else seen.err


def test_a_run_keeps_its_weights_if_the_original_changes(store, capsys):
    save_network(Path("mine"), seed=1)
    begun(store, started("mine"))
    found = dry(capsys, store)
    assert (found["steps"]["train"], found["recipe"]["train"]["init"]) == ("done", "mine")
    assert [note for note in found["notes"] if "by now" in note or "cannot be read" in note] == []
    save_network(Path("mine"), seed=2)
    (note,) = dry(capsys, store)["notes"]
    assert "mine has other weights by now" in note
    assert "give --run another name" in note
    shutil.rmtree("mine")
    found = dry(capsys, store)
    assert found["steps"]["train"] == "done"
    assert "cannot be read now, and this run uses the copy in the store" in found["notes"][0]


def test_a_champion_made_by_the_run_itself_leaves_it_done(models, capsys):
    store, tracking = models
    begun(store, started(f"models:/{MODEL}@champion"))
    move_alias(tracking, by_number(tracking, MODEL, 2), "champion")
    found = dry(capsys, store)
    assert found["steps"]["train"] == "done"
    assert f"has other weights by now (models:/{MODEL}/2" in found["notes"][0]


def test_other_weights_under_a_runs_name_are_drift_with_a_remedy(store, capsys):
    begun(store, started("runs/old/train/model"))
    save_network(Path("other"))
    told = dry(capsys, store, "--train.init", "other", code=2)
    assert "but run 'mine' was begun with" in told
    remedy = re.search(r"resume with (--train\.init) (\S+)", told)
    assert dry(capsys, store, *remedy.groups())["steps"]["train"] == "done"
    shutil.copytree(store.path("runs/old/train/model"), "copy")
    assert dry(capsys, store, "--train.init", "copy")["steps"]["train"] == "done"
    with pytest.raises(DriftError):
        weights_of_run(started("other"), store, "mine", kept_source="runs/old/train/model")
    assert "step train of run 'mine' was started with another configuration" in dry(
        capsys, store, "--train.init", "", code=2
    )


def test_a_run_from_before_initial_weights_is_still_done(store, capsys):
    finish(store.uri, "mine", QUICK, last="train")
    for name in ("tune", "train"):
        config = store.at("runs/mine", name)
        kept = json.loads(config.get("config.json"))
        train = kept["config"]["start"]["train"] if name == "tune" else kept["config"]["train"]
        del train["init"], train["freeze"], train["optim"]["layer_decay"]
        config.put("config.json", to_json(kept))
    assert dry(capsys, store, "--workflow", "release")["steps"] == {"shard": "done", "tune": "done", "train": "done"}


def test_weights_are_kept_once_and_a_damaged_copy_is_not_used(store):
    found = find_weights("runs/old/train/model", store)
    for _ in range(2):
        found.keep(store)
    kept = sorted(store.list("weights/"))
    assert kept == [f"weights/{found.digest}/{name}" for name in ("model.json", "origin.json", "weights.safetensors")]
    config = TrainStepConfig(train=TrainConfig(init=found.digest))
    state, card = read_kept(kept_uri(config, store), found.digest)
    assert state.keys() == load_model(store.path("runs/old/train/model"))[0].state_dict().keys()
    assert card == found.card
    store.put(kept[0], store.get(kept[0]).replace(b"spiculated", b"Spiculated"))
    with pytest.raises(ValueError, match="do not match the digest in its name"):
        read_kept(kept_uri(config, store), found.digest)
    assert kept_uri(TrainStepConfig(), store) == ""


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def phantoms(store) -> tuple[StepContext, dict]:
    config = DataConfig(phantoms=PhantomConfig(num_patients=30, images_per_patient=1, side=32))
    shard = {"data": "datasets/phantoms/default"}
    shard["digest"] = convert(config, store.at(shard["data"]))["digest"]
    return StepContext(store, "r", None, tracking=None, show=Listener()), shard


def begin(context: StepContext, shard: dict, source: str, **train) -> tuple[dict[str, str], str]:
    """(what is recorded, what is said) of a training from `source`."""
    found = find_weights(source, context.store)
    found.keep(context.store)
    context = replace(context, show=Listener())
    config = TrainStepConfig(train=TrainConfig(init=found.digest, **train))
    return begin_from(config, shard, context), "\n".join(context.show.said)


def test_what_is_taken_over_is_said_and_recorded(phantoms):
    context, shard = phantoms
    classes = ["spiculated mass", "no lesion", "smooth ellipse"]
    save_network(Path("same"), classes=classes, image_size=64, channels=1)
    origin, said = begin(context, shard, "same", freeze=("patch_embed.*",))
    assert origin["uri"] == str(Path("same").resolve())
    assert origin["head"] == "head kept and reordered: the same 3 classes in another order"
    assert said.splitlines() == [
        f"starting from {origin['uri']} (weights {origin['digest'][:12]}): {origin['head']}; all other layers kept",
        "frozen: 4 of 115 parameters, with the BatchNorms among them",
    ]
    _, said = begin(context, shard, "same", image_size=32)
    assert (
        "the weights saw gray images of 64 px, this training has gray images of 32 px: every layer takes both" in said
    )


def test_weights_that_may_have_seen_test_images_bring_a_warning(phantoms):
    context, shard = phantoms
    for name, manifest in (("same", shard["digest"]), ("other", "a" * 64)):
        save_network(Path(name), dataset="phantoms", manifest=manifest)
    save_network(Path("elsewhere"), dataset="bccd", manifest="a" * 64)
    assert {name: "caution" in begin(context, shard, name)[1] for name in ("same", "other", "elsewhere")} == {
        "same": False,
        "other": True,
        "elsewhere": False,
    }


def test_a_new_head_must_not_be_frozen_and_random_starts_quietly(phantoms):
    context, shard = phantoms
    save_network(Path("other"), classes=["a", "b"])
    with pytest.raises(ValueError, match=r"freezes the head, but it is new and random .* leave head\.\* out"):
        begin(context, shard, "other", freeze=("head.*",))
    assert HEAD == ("head.weight", "head.bias")
    assert begin_from(TrainStepConfig(), shard, context) == {}
    assert context.show.said == []


def test_weights_on_s3_are_found_and_kept_as_in_a_folder(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, bucket = open_store(f"{s3}/store"), open_store(f"{s3}/given")
    registered.facts(store, "old", auc=0.9)
    export_upstream(load_model(save_network(Path("other")))[0], Path("nano.pth"))
    bucket.put("nano.pth", Path("nano.pth"))
    for name in ("model.json", "weights.safetensors"):
        bucket.put(f"model/{name}", Path("other") / name)
    assert find_weights("runs/old/train/model", store).uri == f"{s3}/store/runs/old/train/model"
    assert find_weights(f"{s3}/given/model", store).digest == find_weights("other", store).digest
    upstream = find_weights(f"{s3}/given/nano.pth", store)
    assert (upstream.uri, upstream.digest) == (f"{s3}/given/nano.pth", find_weights("nano.pth", store).digest)
    upstream.keep(store)
    state, card = read_kept(kept_uri(TrainStepConfig(train=TrainConfig(init=upstream.digest)), store), upstream.digest)
    assert (len(state), card) == (len(load_model(Path("other"))[0].state_dict()), {})
    bucket.put("bad.pth", b"no tensors")
    with pytest.raises(ValueError, match=re.escape(f"train.init: {s3}/given/bad.pth: cannot be read as tensors")):
        find_weights(f"{s3}/given/bad.pth", store)
    with pytest.raises(ValueError, match="no weights found at"):
        find_weights(f"{s3}/given/none.pth", store)
