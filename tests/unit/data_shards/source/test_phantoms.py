"""The phantoms: repeatable, visible, and told apart by shape rather than by pixel."""

import itertools

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from data_shards.config import PhantomConfig
from data_shards.source.phantoms import CLASSES, diagnosis, phantom

CONFIG = PhantomConfig(num_patients=240)


@pytest.fixture(scope="module")
def drawn():
    """Images, labels and patients of 240 patients of 4 images."""
    places = [(p, i) for p in range(CONFIG.num_patients) for i in range(4)]
    images = np.stack([phantom(CONFIG, 0, p, i) for p, i in places])
    patients = np.array([p for p, _ in places])
    return images, np.array([diagnosis(p) for p in patients]), patients


def test_an_image_is_a_function_of_seed_patient_and_image():
    first = phantom(CONFIG, 0, 5, 2)
    assert first.dtype == np.uint8
    assert first.shape == (64, 64)
    assert np.array_equal(first, phantom(CONFIG, 0, 5, 2))
    for other in ((1, 5, 2), (0, 8, 2), (0, 5, 3)):
        assert not np.array_equal(first, phantom(CONFIG, *other))


def test_images_are_drawn_at_the_side_asked_for():
    assert phantom(PhantomConfig(side=97), 0, 0, 0).shape == (97, 97)


@pytest.mark.parametrize("side", [28, 64])
def test_a_linear_model_on_pixels_fails(drawn, side):
    from medmamba.metrics.baselines import logistic_regression

    images, labels, patients = drawn
    small = np.stack([np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BILINEAR)) for x in images])
    test = np.random.default_rng(0).permutation(CONFIG.num_patients)[:60]
    held_out = np.isin(patients, test)
    scores = logistic_regression(small[~held_out], labels[~held_out], small[held_out], 3)
    assert roc_auc_score(labels[held_out], scores, multi_class="ovr") <= 0.70


def test_brightness_and_spread_tell_nothing(drawn):
    images, labels, _ = drawn
    for feature in (images.mean((1, 2)), images.std((1, 2))):
        for label in range(3):
            assert abs(roc_auc_score(labels == label, feature) - 0.5) < 0.1


def test_the_three_classes_take_turns_and_have_names():
    assert [CLASSES[diagnosis(p)] for p in range(4)] == ["no lesion", "smooth ellipse", "spiculated mass", "no lesion"]


@pytest.mark.slow
def test_a_small_network_succeeds_within_a_hundred_steps(drawn):
    import torch
    from torch import nn

    images, labels, patients = drawn
    torch.manual_seed(0)
    widths = (1, 16, 32, 64, 64)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in itertools.pairwise(widths)
    ]
    net = nn.Sequential(*blocks, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))
    x, y = torch.tensor(images)[:, None] / 127.5 - 1, torch.tensor(labels)
    held_out = torch.tensor(patients >= 180)
    chosen = torch.nonzero(~held_out).flatten()
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(100):
        batch = chosen[torch.randint(len(chosen), (32,))]
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()
    with torch.no_grad():
        scores = net(x[held_out]).softmax(1).numpy()
    assert roc_auc_score(labels[held_out.numpy()], scores, multi_class="ovr") > 0.95
