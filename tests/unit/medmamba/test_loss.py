"""The losses against PyTorch's own, and class weights that keep the loss's size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from medmamba.loss import class_weights, classification_loss, scores


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 3, generator=generator)
    classes = torch.arange(12) % 3
    return logits, classes, F.one_hot(classes, 3).to(torch.uint8)


@pytest.mark.parametrize("task", ["multiclass", "ordinal"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_exclusive_classes_use_cross_entropy(batch, task, smoothing):
    logits, classes, labels = batch
    expected = F.cross_entropy(logits, classes, label_smoothing=smoothing)
    torch.testing.assert_close(classification_loss(logits, labels, task, label_smoothing=smoothing), expected)


def test_multilabel_uses_binary_cross_entropy(batch):
    logits = batch[0]
    labels = (torch.rand(12, 3, generator=torch.Generator().manual_seed(1)) < 0.5).to(torch.uint8)
    expected = F.binary_cross_entropy_with_logits(logits, labels.float())
    torch.testing.assert_close(classification_loss(logits, labels, "multilabel"), expected)
    doubled = classification_loss(logits, labels, "multilabel", weights=torch.full((3,), 2.0))
    torch.testing.assert_close(doubled, 2 * expected)


def test_a_weighted_loss_averages_over_half_batches(batch):
    logits, classes, labels = batch
    order = torch.argsort(classes)  # the halves then differ in their classes
    logits, labels, weights = logits[order], labels[order], torch.tensor([0.5, 1.0, 4.0])
    halves = [
        classification_loss(logits[h], labels[h], "multiclass", weights=weights) for h in (slice(6), slice(6, 12))
    ]
    whole = classification_loss(logits, labels, "multiclass", weights=weights)
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    expected = (F.cross_entropy(logits, classes[order], reduction="none") * weights[classes[order]]).mean()
    torch.testing.assert_close(whole, expected)


def test_class_weights_have_mean_one_over_the_samples():
    counts = [10, 30, 160]
    weights = class_weights(counts)
    assert np.dot(weights, counts) / sum(counts) == pytest.approx(1)
    assert weights[0] / weights[2] == pytest.approx(16)


def test_a_class_without_samples_cannot_be_weighted():
    with pytest.raises(ValueError, match=r"\[3, 0\]"):
        class_weights([3, 0])


def test_low_precision_logits_give_a_float32_loss_and_scores(batch):
    logits, _, labels = batch
    assert classification_loss(logits.bfloat16(), labels, "multiclass").dtype == torch.float32
    assert scores(logits.bfloat16(), "multiclass").dtype == torch.float32


def test_scores_are_probabilities_of_the_task(batch):
    logits = batch[0]
    torch.testing.assert_close(scores(logits, "multiclass").sum(1), torch.ones(12))
    torch.testing.assert_close(scores(logits, "multilabel"), torch.sigmoid(logits))


def test_an_unknown_task_is_refused(batch):
    logits, _, labels = batch
    with pytest.raises(ValueError, match="'regression'"):
        classification_loss(logits, labels, "regression")
