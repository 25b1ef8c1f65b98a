"""The baselines of the network's metrics, which cannot lose the evaluation."""

import dataclasses

import numpy as np
import pytest

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.metrics.classification import evaluate
from pipelines.console.terminal import Terminal
from pipelines.steps.baselines import measure_baselines, stratified
from pipelines.steps.evaluate import EvaluateConfig


def measured(data, show=None, **settings):
    config = EvaluateConfig(**settings)
    return measure_baselines(data, side=config.baseline_side, num_samples=config.baseline_samples, show=show)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = DataConfig(phantoms=PhantomConfig(num_patients=60, images_per_patient=2, side=32), samples_per_shard=30)
    store = open_store(str(tmp_path_factory.mktemp("data")))
    convert(config, store)
    return open_dataset(store)


def test_a_rare_class_is_among_the_baselines_training_samples():
    classes = np.array([0] * 900 + [1] * 99 + [2])
    chosen = stratified(classes, 100)
    assert np.bincount(classes[chosen]).tolist() == [90, 9, 1]
    assert (np.diff(chosen) > 0).all()
    assert (stratified(classes, 100) == chosen).all()
    assert stratified(classes, 1000).tolist() == list(range(1000))


def test_yardsticks_are_fitted_on_few_images_of_every_class(data):
    found, absent = measured(data, baseline_side=16, baseline_samples=10)
    assert absent == {}  # images of one size have no baseline of sizes, which is not worth a line
    for name in ("pixels", "chance"):
        assert found[name].keys() == {"auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1"}


def test_chance_is_always_naming_the_largest_class(data):
    labels = data.index("test").labels
    guess = np.zeros(labels.shape)
    guess[:, data.index("train").labels.sum(0).argmax()] = 1
    found, _ = measured(data, baseline_side=16, baseline_samples=10)
    assert found["chance"] == pytest.approx(evaluate(guess, labels, "multiclass"))


def test_the_terminal_says_when_baselines_are_read_and_fitted(data, capsys):
    terminal = Terminal()
    measured(data, terminal, baseline_side=16)
    terminal.close()
    told = capsys.readouterr().err
    num = len(data.index("train")) + len(data.index("test"))
    assert f"baselines: {num}/{num} images read" in told
    assert f"fitting the baseline 'pixels' on {len(data.index('train'))} training images" in told


@pytest.mark.parametrize("task", ["off", "multilabel"])
def test_where_there_are_no_baselines_the_reason_is_given(data, task):
    manifest = data.manifest.model_copy(update={"task": "multilabel" if task == "multilabel" else "multiclass"})
    found, absent = measured(dataclasses.replace(data, manifest=manifest), baseline_side=0 if task == "off" else 16)
    assert found == {}
    assert set(absent) == {"all"}


def test_a_baseline_that_cannot_be_fitted_has_a_reason(data):
    manifest = data.manifest.model_copy(update={"classes": (*data.manifest.classes, "one that no image shows")})
    found, absent = measured(dataclasses.replace(data, manifest=manifest), baseline_side=16)
    assert set(found) == {"chance"}
    assert "the yardstick needs every class" in absent["pixels"]
