"""The layout of the public brain MRI set, imitated, from its folders to a champion without a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from chain import medmamba
from mlflow import MlflowClient
from PIL import Image

from data_shards.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
NUM = {"Training": 40, "Testing": 10}  # of each class
SMALL = [
    "--train.epochs", "6", "--train.batch-size", "16", "--train.micro-batch", "8", "--train.image-size", "48",
    "--evaluate.baseline-side", "16",
]  # fmt: skip


def slice_of(number: int, kind: int) -> Image.Image:
    """A blotchy grey disc on black whose class is the grain inside: nothing that single pixels or sizes could tell."""
    random = np.random.default_rng(number)
    height, width = random.integers(60, 76, 2)
    y, x = np.mgrid[:height, :width]
    turn, phase = random.uniform(0, 2 * np.pi, 2)
    grain = np.sin((x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / (4, 7, 12, 21)[kind] + phase)
    inside = ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2) < 0.2
    coarse = Image.fromarray(random.integers(0, 256, (6, 6), dtype=np.uint8))
    blotches = np.asarray(coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)) - 128.0
    grey = inside * (120 + 0.4 * blotches + 60 * grain + random.normal(0, 8, (height, width)))
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def brain_mri(tmp_path_factory) -> Path:
    """`Training/` and `Testing/` around four classes of JPEGs, some of them twice, and what notebooks leave behind."""
    root = tmp_path_factory.mktemp("brain") / "archive"
    for split, num in NUM.items():
        for kind, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(num):
                number = 10_000 * kind + 1000 * (split == "Testing") + i
                slice_of(number, kind).save(folder / f"{split[:2]}-{name[:2]}_{i:04d}.jpg", quality=92)
    for i in range(4):
        first = root / "Training" / "notumor" / f"Tr-no_{i:04d}.jpg"
        shutil.copy(first, first.with_name(f"Tr-no_{900 + i:04d}.jpg"))
    for folder in ("", "Training", "Testing/glioma"):
        litter = root / folder / ".ipynb_checkpoints"
        litter.mkdir()
        slice_of(1, 1).save(litter / "Tr-gl_0001-checkpoint.jpg")
    return root


def command(source: Path, store: Path, *more: str) -> list[str]:
    data = ["--data.dataset", "brain-mri", "--data.layout", "folders", "--data.source", str(source)]
    return [*more, "--recipe", "quickstart", *data, *SMALL, "--store", str(store)]


def test_the_brain_mri_folders_become_a_champion_without_a_table(brain_mri, tmp_path):
    store = tmp_path / "store"
    asked = command(brain_mri, store, "run", "direct")
    done = medmamba(*asked, cwd=tmp_path, timeout_s=600)
    printed = " ".join(done.stdout.split())
    assert "splits: train and test from the folders Training and Testing; val drawn from train" in printed
    table = {name: printed.partition(f" {name} │ ")[2].split(" ", 7)[:7:2] for name in CLASSES}
    assert {row[2] for row in table.values()} == {str(NUM["Testing"])}
    assert [row[3] for row in table.values()] == ["50", "50", "54", "50"]
    assert "4 classes (train/val/test): glioma" in done.stderr

    facts = json.loads(medmamba(*asked, "--json", cwd=tmp_path).stdout)
    assert sorted(facts["shard"]["counts"]["train"]) == sorted(CLASSES)
    assert facts["shard"]["samples"]["test"] == 40
    assert facts["shard"]["leaks"]["exact within a split"] == 4
    assert facts["promote"]["verdict"] == "yes"
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    champion = client.get_model_version_by_alias("medmamba-brain-mri", "champion")
    assert int(champion.version) == facts["register"]["version"] == 1
    assert client.get_run(facts["shard"]["mlflow_run"]).data.metrics["num_test"] == 40
    predicted = json.loads(
        medmamba(
            "predict", str(next(brain_mri.glob("Testing/*/*.jpg"))), "--json", "--store", str(store), cwd=tmp_path
        ).stdout
    )
    assert set(predicted[0]["scores"]) == set(CLASSES)


def test_copies_across_official_folders_are_refused(brain_mri, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(brain_mri, root)
    shutil.copy(root / "Training/glioma/Tr-gl_0003.jpg", root / "Testing/glioma/Te-gl_0999.jpg")
    asked = command(root, tmp_path / "store", "shard")
    refused = medmamba(*asked, cwd=tmp_path, code=1).stderr
    assert "--data.duplicates.across drop, move or report" in refused
    medmamba(*asked, "--data.duplicates.across", "drop", cwd=tmp_path)  # under the same name
    record = json.loads(open_store(str(tmp_path / "store")).get("runs/quickstart/shard/record.json"))
    assert (record["facts"]["dropped"], record["facts"]["samples"]["test"]) == (1, 41)
