"""Corruptions: the same bytes for the same arguments, stronger with each grade, and harder for a trained network."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from data_shards.config import PhantomConfig
from data_shards.source.phantoms import diagnosis, phantom
from medmamba.config import ConvNetConfig
from medmamba.corruptions import CORRUPTIONS, GRADES, corrupt
from medmamba.model import build_model
from medmamba.preprocess import preprocess


def picture(channels: int = 3, height: int = 60, width: int = 44) -> np.ndarray:
    """Smooth color with a bright square and some grain, so that every corruption has something to change."""
    y, x = np.mgrid[0:height, 0:width]
    planes = np.stack([90 + 60 * np.sin(x / (5 + c)) * np.cos(y / 7) for c in range(channels)], -1)
    planes[height // 3 : height // 2, width // 3 : width // 2] += 70
    return (planes + np.random.default_rng(0).normal(0, 6, planes.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_its_arguments_alone(name, channels):
    image = picture(channels)
    kept = image.copy()
    found = corrupt(image, name, 4, "a sample's key")
    np.random.default_rng().random()
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    assert (image == kept).all()
    assert (found == corrupt(image, name, 4, "a sample's key")).all()


@pytest.mark.parametrize("name", ["noise", "rotation", "brightness", "occlusion"])
def test_images_of_other_seeds_are_corrupted_in_other_ways(name):
    found = {hashlib.sha256(corrupt(picture(), name, 3, seed).tobytes()).hexdigest() for seed in range(8)}
    assert len(found) > 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_grade_is_farther_from_the_image(name):
    image = picture()
    distances = [
        np.mean([np.abs(corrupt(image, name, grade, seed) - image.astype(float)).mean() for seed in range(6)])
        for grade in GRADES
    ]
    assert distances == sorted(distances)
    assert distances[0] < 14  # of 255: barely visible
    assert distances[-1] > 2 * distances[0]


def test_a_higher_grade_covers_what_a_lower_one_covers():
    image = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64, 1).astype(np.uint8)
    covered = [corrupt(image, "occlusion", grade, 5) != image for grade in GRADES]
    for less, more in itertools.pairwise(covered):
        assert not (less & ~more).any()
    assert 0.45 < covered[-1].mean() < 0.55


def test_a_turned_image_of_one_color_has_no_corners_of_another():
    image = np.full((40, 64, 3), 200, np.uint8)
    assert (corrupt(image, "rotation", 5, 0) == 200).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (9, 2, 3), (28, 28, 1)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_of_a_few_pixels_are_corrupted_too(name, shape):
    assert corrupt(np.full(shape, 90, np.uint8), name, 5, 0).shape == shape


@pytest.mark.parametrize(
    ("image", "name", "grade", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), "noise", 1, "takes uint8"),
        (np.zeros((4, 4), np.uint8), "noise", 1, "takes uint8"),
        (np.zeros((0, 4, 3), np.uint8), "noise", 1, "takes uint8"),
        (np.zeros((4, 4, 3), np.uint8), "fog", 1, "'fog' does not exist; choose one of noise"),
        (np.zeros((4, 4, 3), np.uint8), "noise", 6, "grade 6 does not exist"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(image, name, grade, said):
    with pytest.raises(ValueError, match=said):
        corrupt(image, name, grade, 0)


def phantoms(patients: range, images: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = [phantom(PhantomConfig(), 0, patient, image)[..., None] for patient in patients for image in range(images)]
    return np.stack(pixels), np.array([diagnosis(patient) for patient in patients for _ in range(images)])


def trained(images_NHWC: np.ndarray, labels_N: np.ndarray, epochs: int, batch: int = 32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(ConvNetConfig(num_classes=3)).train()
    steps = epochs * (len(images_NHWC) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(images_NHWC))
        for first in range(0, len(order) - batch + 1, batch):
            chosen = order[first : first + batch]
            scores = model(preprocess(torch.from_numpy(images_NHWC[chosen])))
            optimizer.zero_grad()
            cross_entropy(scores, torch.from_numpy(labels_N[chosen])).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images_NHWC: np.ndarray, labels_N: np.ndarray) -> float:
    return float((model(preprocess(torch.from_numpy(images_NHWC))).argmax(1).numpy() == labels_N).mean())


@pytest.mark.slow
def test_grade_5_of_each_corruption_lowers_the_accuracy():
    model = trained(*phantoms(range(300), 3), epochs=12)
    images, labels = phantoms(range(1000, 1150), 2)
    clean = accuracy(model, images, labels)
    assert clean > 0.95
    of_name = {
        name: [
            accuracy(model, np.stack([corrupt(x, name, grade, i) for i, x in enumerate(images)]), labels)
            for grade in GRADES
        ]
        for name in CORRUPTIONS
    }
    for name, found in of_name.items():
        assert found[0] > clean - 0.06, (name, found)
        assert found[-1] < clean - 0.04, (name, found)
        assert max(b - a for a, b in itertools.pairwise(found)) < 0.02, (name, found)
    mean = np.mean(list(of_name.values()), axis=0)
    assert (np.diff(mean) < 0).all(), mean
