"""Metrics against scikit-learn and plain sums, and their independence of how the data is split."""

import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, top_k_accuracy_score
from torch.nn import functional as F

from bnfinetune.training.measuring.metrics import Tally


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (203,), generator=generator)
    logits = torch.randn(203, 7, generator=generator) + 1.5 * F.one_hot(labels, 7)
    return logits, labels


def tally_of(logits, labels, sizes):
    tally = Tally(7)
    for part, target in zip(logits.split(sizes), labels.split(sizes), strict=True):
        tally.add(part, target)
    return tally.metrics()


def test_metrics_equal_scikit_learn(predictions):
    logits, labels = predictions
    metrics = tally_of(logits, labels, [203])
    predicted = logits.argmax(1)
    assert metrics.images == 203
    assert metrics.top1 == pytest.approx((predicted == labels).double().mean().item())
    assert metrics.top5 == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert metrics.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert [list(row) for row in metrics.confusion] == confusion_matrix(labels, predicted).tolist()
    assert metrics.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    recall = [(predicted[labels == c] == c).double().mean().item() for c in range(7)]
    assert metrics.per_class == pytest.approx(recall)


def test_calibration_error_equals_its_definition(predictions):
    logits, labels = predictions
    confidence, predicted = logits.softmax(1).max(1)
    error = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            gap = confidence[inside].mean() - (predicted[inside] == labels[inside]).float().mean()
            error += inside.float().mean().item() * abs(gap.item())
    assert tally_of(logits, labels, [203]).ece == pytest.approx(error, rel=1e-5)


def test_metrics_do_not_depend_on_the_batches(predictions):
    whole = tally_of(*predictions, [203])
    parts = tally_of(*predictions, [1, 100, 2, 64, 36])
    assert parts.confusion == whole.confusion
    assert parts.scalars() == pytest.approx(whole.scalars(), rel=1e-6)


def test_two_classes_and_absent_classes():
    tally = Tally(2)
    tally.add(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))
    metrics = tally.metrics()
    assert (metrics.top1, metrics.top5, metrics.macro_f1) == (1.0, 1.0, 1.0)
