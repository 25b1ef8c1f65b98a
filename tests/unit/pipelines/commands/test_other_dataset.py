"""`evaluate --on`: a run's model on another dataset is what one gets by hand, and classes are mapped or refused."""

import hashlib
import json

import numpy as np
import pytest
import torch
from drawn_predictions import drawn
from finished_run import FACTS, finish
from sklearn.metrics import confusion_matrix, roc_auc_score

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.loader import Loader
from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.checkpoint import load_model, save_model
from medmamba.config import MedMambaConfig
from medmamba.model import build_model
from medmamba.preprocess import preprocess
from pipelines.cli import main
from pipelines.evaluation.calibrator import fit
from pipelines.evaluation.parts import Study
from pipelines.evaluation.predictions import read_predictions, to_parquet
from pipelines.recipes import Recipe

OWN = ["healthy", "spiculated mass"]
MAP = '"no lesion" = "healthy"\n"smooth ellipse" = ""\n'
VALIDATION = "runs/r/evaluate/predictions-val.parquet"
STUDY = "runs/r/evaluate-on-phantoms-default/evaluation.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with another dataset and a finished run whose model has two classes."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    config = DataConfig(phantoms=PhantomConfig(num_patients=60, images_per_patient=2, side=32), samples_per_shard=30)
    convert(config, store.at("datasets", "phantoms", "default"))
    torch.manual_seed(0)
    settings, digest = MedMambaConfig(variant="nano", num_classes=len(OWN)), hashlib.sha256()
    card = {"classes": OWN, "task": "multiclass", "image_size": 32, "channels": 1, "dataset": "mine"}
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, build_model(settings), settings, card=card)
    for name in ("weights.safetensors", "model.json"):
        data = (folder / name).read_bytes()
        digest.update(data)
        store.put(f"runs/r/train/model/{name}", data)
    train = {**FACTS["train"], "digest": digest.hexdigest()}
    evaluate = {**FACTS["evaluate"], "study": "runs/r/evaluate/evaluation.json"}
    finish(store.uri, "r", Recipe(), workflow="direct", train=train, evaluate=evaluate)
    store.put(VALIDATION, to_parquet(drawn(OWN, split="val", model=digest.hexdigest())))
    return store


@pytest.fixture
def class_map(tmp_path):
    path = tmp_path / "map.toml"
    path.write_text(MAP)
    return str(path)


def asked(store, *argv: str, code: int = 0) -> None:
    assert main(["evaluate", "--run", "r", "--store", store.uri, "--on", *argv]) == code


def test_another_dataset_is_what_one_gets_by_hand(store, class_map, capsys):
    before = {key: store.get(key) for key in store.list()}
    asked(store, "phantoms", "--class-map", class_map)
    shown = capsys.readouterr().out
    assert "Classes of the test split" in shown
    found = Study.model_validate_json(store.get(STUDY))
    assert {key: store.get(key) for key in before} == before

    data = open_dataset(store.at("datasets/phantoms/default"))
    labels = data.index("test").labels
    model, _, _ = load_model(store.path("runs/r/train/model"))
    with Loader(data) as loader, torch.inference_mode():
        images = torch.from_numpy(np.array(loader.read("test", np.arange(len(labels)), image_size=32)))
        logits = model(preprocess(images.expand(*images.shape[:3], 3))).numpy()
    kept = labels[:, data.manifest.classes.index("smooth ellipse")] == 0
    truth = labels[kept, data.manifest.classes.index("spiculated mass")]
    assert found.num_samples == kept.sum() < len(labels)
    assert f"{kept.sum()} images, {(~kept).sum()} left out" in shown
    gap = logits[kept, 1] - logits[kept, 0]
    assert found.by_class[1].figures["auc"].value == pytest.approx(roc_auc_score(truth, gap), abs=1e-6)
    assert found.confusion == confusion_matrix(truth, gap > 0, labels=[0, 1]).tolist()
    assert found.manifest == data.digest

    temperature = fit(read_predictions(store, VALIDATION)).temperature
    assert found.calibration.temperature == temperature
    sure = 1 / (1 + np.exp(-np.abs(gap) / temperature))
    bins = found.calibration.calibrated.curve
    mean = sum(each.confidence * each.count for each in bins) / sum(each.count for each in bins)
    assert mean == pytest.approx(sure.mean(), abs=1e-5)


def test_another_split_has_its_own_folder_and_json_all(store, class_map, capsys):
    asked(store, "phantoms/default", "--class-map", class_map, "--split", "val", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["study"] == "runs/r/evaluate-on-phantoms-default-val/evaluation.json"
    assert Study.model_validate(told["evaluation"]) == Study.model_validate_json(store.get(told["study"]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "without a counterpart in the model: 'no lesion', 'smooth ellipse'; the model has 'healthy'"),
        ('"no lesion" = "healthy"\n', "without a counterpart in the model: 'smooth ellipse';"),
        (MAP + '"cyst" = ""\n', "'cyst' not in the dataset, whose classes are 'no lesion'"),
        (MAP + '"spiculated mass" = "sick"\n', "'sick' not a class of the model"),
        (MAP + "number = 3\n", "'number' is not mapped to a text"),
        ("no lesion = healthy", "cannot be read"),
    ],
    ids=["nothing mapped", "one left", "unknown class", "unknown target", "number", "no TOML"],
)
def test_classes_that_cannot_be_mapped_are_listed(store, tmp_path, capsys, text, says):
    path = tmp_path / "map.toml"
    path.write_text(text)
    asked(store, "phantoms", "--class-map", str(path), code=1)
    assert says in capsys.readouterr().err


def test_options_for_another_dataset_need_one(store, capsys):
    assert main(["evaluate", "--run", "r", "--store", store.uri, "--split", "val"]) == 2
    assert "belong to --on" in capsys.readouterr().err
    asked(store, "phantoms", "--split", "none", code=2)
    assert "has train, val, test" in capsys.readouterr().err
    asked(store, "pets", code=2)
    assert "'pets' not found" in capsys.readouterr().err
