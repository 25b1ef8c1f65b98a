"""Which images are picked, and an image under its map."""

import io

import numpy as np
import pytest
from PIL import Image

from medmamba.examples import overlay, pick, viridis


def test_worst_best_and_uncertain_are_picked_once_each():
    scores = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.99, 0.01], [0.45, 0.55], [0.01, 0.99]])
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1]])
    picks = pick(scores, labels, "multiclass", count=2)
    assert [part.tolist() for part in picks] == [[3, 1], [5, 0], [4, 2]]
    assert [part.tolist() for part in pick(scores, labels, "multiclass", count=1)] == [[3], [5], [1]]


def test_in_an_ordinal_set_the_worst_is_the_farthest():
    scores = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.4, 0.0, 0.6, 0.0]])
    labels = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
    assert [part.tolist() for part in pick(scores, labels, "ordinal", count=1)] == [[1], [0], [2]]


def test_in_a_multilabel_set_all_labels_count():
    scores = np.array([[0.9, 0.9], [0.1, 0.1], [0.5, 0.6]])
    labels = np.array([[1, 1], [1, 1], [0, 1]])
    assert [part.tolist() for part in pick(scores, labels, "multilabel", count=1)] == [[1], [0], [2]]


def test_few_samples_are_shared_and_equals_are_taken_in_order():
    scores, labels = np.full((4, 2), 0.5), np.array([[1, 0]] * 4)
    assert [part.tolist() for part in pick(scores, labels, "multiclass", count=3)] == [[0, 1, 2], [], [3]]
    assert [part.tolist() for part in pick(scores[:0], labels[:0], "multiclass")] == [[], [], []]


def test_certain_scores_have_a_finite_loss():
    scores = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    labels = np.array([[1, 0], [1, 0], [1, 0]])
    assert pick(scores, labels, "multiclass", count=1).worst.tolist() == [1]
    assert pick(scores, labels, "multilabel", count=1).worst.tolist() == [1]


@pytest.mark.parametrize(
    ("scores", "labels", "task", "said"),
    [
        (np.ones((2, 3)), np.ones((2, 2)), "multiclass", "both must be"),
        (np.ones((2, 3)), np.ones((2, 3)), "regression", "must be multiclass"),
    ],
)
def test_what_does_not_fit_is_refused(scores, labels, task, said):
    with pytest.raises(ValueError, match=said):
        pick(scores, labels, task)


def test_the_colors_are_those_of_matplotlib():
    matplotlib = pytest.importorskip("matplotlib")
    values = np.linspace(0, 1, 256)
    assert np.abs(viridis(values) - 255 * matplotlib.colormaps["viridis"](values)[:, :3]).max() < 6


@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_shows_the_image_where_the_map_is_low(channels):
    image = np.random.default_rng(0).integers(0, 255, (20, 30, channels), dtype=np.uint8)
    heat = np.zeros((20, 30), np.float32)
    heat[:, 20:] = 1
    data = overlay(image, heat, strength=1)
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.size) == ("PNG", (30, 20))
        found = np.asarray(picture.convert("RGB"))
    gray = np.asarray(Image.fromarray(image[..., 0] if channels == 1 else image).convert("L"))
    assert (found[:, :20] == gray[:, :20, None]).all()
    assert (found[:, 20:] == [253, 231, 37]).all()


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match="one height and width"):
        overlay(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4)))
