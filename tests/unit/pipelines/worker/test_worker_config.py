"""What a training is: combinations that a worker could not run are refused before any work."""

import pytest
import torch

from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.model import build_model
from pipelines.cli import main
from pipelines.worker.config import TrainConfig, TrainStepConfig


def dims(stages: int, **more) -> MedMambaConfig:
    widths = tuple(4 << stage for stage in range(stages))
    return MedMambaConfig(dims=widths, depths=(1,) * stages, num_classes=2, drop_path=0, **more)


NETWORKS = {
    "MedMamba": dims(4),
    "MedMamba of three stages": dims(3),
    "MedMamba of five stages": dims(5),
    "MedMamba without convolutions": dims(4, branches="scan"),
    "MedMamba without a scan": dims(4, branches="conv"),
    "convnet": ConvNetConfig(widths=(4, 8, 16, 32), num_classes=2),
    "convnet of five stages": ConvNetConfig(widths=(4, 8, 16, 32, 64), num_classes=2),
}


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_size_is_refused_just_where_a_step_would_fail(name, micro_batch):
    network = build_model(NETWORKS[name], scan="reference").train()
    for size in (32, 35, 36, 63, 64, 67, 68, 127, 128):
        try:
            network(torch.zeros(micro_batch, 3, size, size)).sum().backward()
            fails = False
        except (ValueError, RuntimeError):
            fails = True
        try:
            TrainStepConfig(
                model=NETWORKS[name], train=TrainConfig(image_size=size, micro_batch=micro_batch, batch_size=2)
            )
            refused = False
        except ValueError:
            refused = True
        assert refused == fails, size


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_recommended_size_is_the_smallest_that_works(name, side):
    least = NETWORKS[name].least_image_size(side)
    assert NETWORKS[name].last_side(least) == side
    assert NETWORKS[name].last_side(least - 1) < side


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["--train.image-size", "32", "--train.micro-batch", "1"],
            "train.image_size 32 with train.micro_batch 1: BatchNorm needs more than one value per channel, and the "
            "last stage's maps are 1 x 1; use train.image_size 64 or more, or train.micro_batch 2 or more",
        ),
        (
            ["--train.image-size", "35", "--train.micro-batch", "1", "--model.kind", "convnet"],
            "train.image_size 35 with train.micro_batch 1: BatchNorm needs more than one value per channel, and the "
            "last stage's maps are 1 x 1; use train.image_size 36 or more, or train.micro_batch 2 or more",
        ),
        (
            ["--train.image-size", "63", "--model.dims", "4", "8", "16", "32", "64", "--model.depths", *"11111"],
            "train.image_size 63 is too small: every stage of the network halves the image; "
            "use at least 64, or a network with fewer stages",
        ),
    ],
    ids=["MedMamba", "convnet", "five stages"],
)
@pytest.mark.parametrize("verb", [["run", "release"], ["run", "direct"], ["shard"], ["tune"], ["train"]], ids=" ".join)
def test_images_too_small_for_the_micro_batch_are_reported_early(verb, argv, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([*verb, "--recipe", "quickstart", *argv]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
