"""The training step around the workers: what it resumes from, what it keeps, what it tells MLflow."""

import json
from types import SimpleNamespace

import pytest

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.store import open_store
from medmamba.config import ConvNetConfig, MedMambaConfig
from pipelines.cluster.board import Board
from pipelines.placement import Placement
from pipelines.steps.context import StepContext
from pipelines.steps.train import check_batches, check_ended, keep_best, tagging
from pipelines.tracking import open_tracking
from pipelines.tracking.outbox import Outbox
from pipelines.worker.checkpoint.stored import Found
from pipelines.worker.config import TrainConfig, TrainStepConfig
from pipelines.worker.launch import RayReporter
from pipelines.worker.meter.bench_rows import BenchSpeed
from pipelines.worker.meter.speed_check import SpeedCheck
from pipelines.worker.state import ResumeError, TrainState, describe

ALONE = Placement(workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="auto", concurrent_trials=1, nodes=1)


@pytest.fixture
def out(tmp_path):
    return open_store(str(tmp_path / "store")).at("runs/r/train")


def test_the_best_model_is_copied_and_the_checkpoint_stays(tmp_path, out):
    best = {"weights.safetensors": tmp_path / "weights", "model.json": tmp_path / "model"}
    best["weights.safetensors"].write_bytes(b"weights")
    best["model.json"].write_text('{"card": {"classes": ["a", "b"]}}')
    state = TrainState(epoch=2, best_epoch=1, best={"val_auc": 0.9, "val_loss": 0.3})
    found = Found("step-0000000008", describe(state, seed=0, placement=ALONE, manifest="m"), {}, best)
    facts = keep_best(found, out, "r", max_side=128)
    assert json.loads(out.get("model/model.json"))["card"] == {"classes": ["a", "b"], "max_side": 128}
    assert (out.get("model/weights.safetensors"), facts["best_epoch"], facts["epochs"]) == (b"weights", 1, 2)
    assert facts["compile"] == ALONE.compile
    assert keep_best(found, out, "r", max_side=128) == facts


@pytest.mark.parametrize(
    ("epoch", "best_epoch", "patience", "has_ended"),
    [(5, 1, 0, True), (4, 4, 0, False), (4, 2, 2, True), (4, 3, 2, False)],
)
def test_a_training_with_a_damaged_last_checkpoint_has_not_ended(epoch, best_epoch, patience, has_ended):
    described = describe(TrainState(epoch=epoch, best_epoch=best_epoch), seed=0, placement=ALONE, manifest="m")
    train = TrainConfig(epochs=5, patience=patience)
    if has_ended:
        check_ended(described, train)
        return
    with pytest.raises(ResumeError, match=r"of epoch 4 of 5: run the same command to resume"):
        check_ended(described, train)


def test_an_epoch_trained_again_after_a_kill_is_not_logged_twice(tmp_path):
    store = open_store(str(tmp_path))
    tracking = open_tracking(store)
    run_id = tracking.step_run(store.at("runs/r/train"), run="r", step="train")
    for epochs in ((1, 2), (2, 3)):  # epoch 2 was logged, but the kill came before its checkpoint
        with Outbox(tracking, run_id) as outbox:
            for epoch in epochs:
                outbox.epoch({"epoch": epoch, "step": 2 * epoch, "train_loss": 1 / epoch}, [0.5, 0.4])
    history = {name: tracking.client.get_metric_history(run_id, name) for name in ("train_loss", "step_loss")}
    assert [point.step for point in history["train_loss"]] == [1, 2, 3]
    assert [point.step for point in history["step_loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_training_far_below_the_bench_is_tagged_and_shown_once(tmp_path):
    store, board, sent = open_store(str(tmp_path)), Board(), []
    tracking = open_tracking(store)
    run_id = tracking.step_run(store.at("runs/r/train"), run="r", step="train")
    bench = BenchSpeed("NVIDIA H200", "T", 224, "bfloat16", 128, 3000.0)
    outbox = Outbox(tracking, run_id)
    judge = tagging(SpeedCheck(bench, ALONE, 128), outbox)
    handle = SimpleNamespace(post=SimpleNamespace(remote=board.post))  # as an actor's, without a Ray
    reporter = RayReporter(sent.append, 0, handle, "train", judge=judge)
    for epoch in (1, 2):
        reporter.epoch({"epoch": epoch, "step": 90 * epoch, "images_per_s_last": 700.0}, [])
    assert [values.get("finished_epoch", "warning") for _, values in board.take()] == [1, "warning", 2]
    outbox.close()
    tag = tracking.client.get_run(run_id).data.tags["medmamba.slow"]
    assert tag.startswith("slow: 700 images/s, but T at 224 px reaches 3,000 on this GPU: ")
    assert len(sent) == 2


@pytest.mark.parametrize("model", [MedMambaConfig(), ConvNetConfig()], ids=["MedMamba", "ConvNet"])
def test_the_network_has_an_output_for_each_class_of_the_data(model):
    assert TrainStepConfig(model=model).with_classes(3).model.num_classes == 3
    five = TrainStepConfig(model=model.model_copy(update={"num_classes": 5}))
    assert five.with_classes(5) == five
    with pytest.raises(ValueError, match=r"num_classes is 5, but the dataset has 3 classes.*leave it at 0"):
        five.with_classes(3)


def test_a_batch_larger_than_the_training_split_is_refused_early(tmp_path):
    store = open_store(str(tmp_path))
    config = DataConfig(phantoms=PhantomConfig(num_patients=30, images_per_patient=1, side=32))
    shard = {"data": "datasets/p/default"}
    shard["digest"] = convert(config, store.at(shard["data"]))["digest"]
    context = StepContext(store, "r", ALONE, tracking=None, show=None)
    check_batches([1, 18], shard, context)
    with pytest.raises(ValueError, match=r"train\.batch_size 32: the training split holds (\d+) images, .* at most \1"):
        check_batches([1, 32], shard, context)
