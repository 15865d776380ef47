"""Metrics against scikit-learn and plain sums, and their independence of how the data is split."""

import math
import pickle

import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, top_k_accuracy_score
from torch.nn import functional as F

import bnfinetune as bnf
from bnfinetune.training.measuring.metrics import LabelTally, Tally
from tests.bn.distributed import run_ranks
from tests.training.loop.test_guard import settings
from tests.training.support import write_images


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (203,), generator=generator)
    logits = torch.randn(203, 7, generator=generator) + 1.5 * F.one_hot(labels, 7)
    return logits, labels


def metrics_of(tally, logits, labels, sizes):
    for part, target in zip(logits.split(sizes), labels.split(sizes), strict=True):
        tally.add(part, target)
    return tally.metrics()


def tally_of(logits, labels, sizes):
    return metrics_of(Tally(7), logits, labels, sizes)


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


@pytest.mark.parametrize("classes", [1_000, 10_450])
def test_metrics_of_many_classes_take_memory_and_state_linear_in_them(classes):
    """And are right: against scikit-learn, without a confusion matrix."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (64,), generator=generator)
    logits = torch.randn(64, classes, generator=generator)
    logits[torch.arange(0, 64, 2), labels[::2]] += 9
    tally = Tally(classes)
    tally.add(logits, labels)
    held = sum(value.numel() for value in vars(tally).values() if isinstance(value, torch.Tensor))
    assert held < 4 * classes
    metrics, predicted = tally.metrics(), logits.argmax(1)
    assert metrics.confusion == ()
    assert metrics.top1 == (predicted == labels).double().mean().item()
    assert metrics.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert len(pickle.dumps(metrics)) < 20 * classes


def test_counts_are_whole_numbers_where_the_logits_are():
    tally = Tally(3)
    assert tally._counts.dtype == torch.int64
    tally.add(torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0]))
    assert tally.metrics().images == 4


def test_a_loss_that_is_not_finite_is_told():
    tally = Tally(2)
    tally.add(torch.tensor([[float("nan"), 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert math.isnan(tally.metrics().loss)
    assert tally.metrics().images == 2


def share_of(rank, logits, labels):
    tally = Tally(7)
    tally.add(logits[rank::3], labels[rank::3])
    tally.merge()
    return tally.metrics()


def test_three_ranks_have_the_metrics_of_one(predictions, tmp_path):
    found = run_ranks(3, share_of, tmp_path, *predictions)
    assert found[0] == found[1] == found[2]
    whole = tally_of(*predictions, [203])
    assert found[0].confusion == whole.confusion
    assert found[0].scalars() == pytest.approx(whole.scalars(), rel=1e-9)


def test_states_hold_no_confusion(tmp_path):
    source = write_images(tmp_path / "images")
    result = bnf.finetune("full", **settings(source, tmp_path / "run", **{"train.steps": 1}))
    state = torch.load(next((tmp_path / "run/checkpoints").iterdir()) / "trainer.pt", weights_only=True)
    assert state["before"]["validation"]["confusion"] == ()
    assert sum(map(sum, result.after["validation"].confusion)) == 9


@pytest.fixture
def label_predictions():
    """Scores with ties, and a class without images."""
    generator = torch.Generator().manual_seed(4)
    labels = (torch.rand(151, 5, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.02, 0.0])).to(torch.uint8)
    logits = (torch.randn(151, 5, generator=generator) + 1.2 * labels).mul(4).round() / 4
    return logits, labels


def label_metrics(logits, labels, sizes, thresholds=None):
    return metrics_of(LabelTally(5, thresholds), logits, labels, sizes)


def test_metrics_of_labels_equal_scikit_learn(label_predictions):
    logits, labels = label_predictions
    metrics = label_metrics(logits, labels, [151])
    expected = [average_precision_score(labels[:, n], logits[:, n]) for n in range(4)]
    assert metrics.per_class == (*map(pytest.approx, expected), None)
    assert metrics.map == pytest.approx(sum(expected) / 4)
    loss = F.binary_cross_entropy_with_logits(logits.double(), labels.double())
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-12)
    predicted = logits.double().sigmoid() >= torch.tensor(metrics.thresholds)
    assert metrics.micro_f1 == pytest.approx(f1_score(labels, predicted, average="micro"))
    present = [n for n in range(5) if labels[:, n].any() or predicted[:, n].any()]
    assert metrics.macro_f1 == pytest.approx(f1_score(labels[:, present], predicted[:, present], average="macro"))


def test_thresholds_have_the_best_f1_there_is(label_predictions):
    logits, labels = label_predictions
    metrics = label_metrics(logits, labels, [151])
    for n in range(4):
        scores = logits[:, n].double().sigmoid()
        chosen = f1_score(labels[:, n], scores >= metrics.thresholds[n])
        assert chosen == max(f1_score(labels[:, n], scores >= cut) for cut in scores.unique())
        assert (scores - metrics.thresholds[n]).abs().min() > 1e-3  # rounding changes no decision
    assert metrics.thresholds[4] == 0.5


def test_thresholds_that_are_given_are_used(label_predictions):
    logits, labels = label_predictions
    metrics = label_metrics(logits, labels, [151], thresholds=[0.9] * 5)
    assert metrics.thresholds == (0.9,) * 5
    assert metrics.micro_f1 == pytest.approx(f1_score(labels, logits.sigmoid() >= 0.9, average="micro"))


def test_metrics_of_labels_do_not_depend_on_the_batches(label_predictions):
    assert label_metrics(*label_predictions, [1, 100, 50]) == label_metrics(*label_predictions, [151])


def test_labels_of_nothing_and_scores_that_are_no_numbers():
    assert (LabelTally(2).metrics().images, LabelTally(2).metrics().map) == (0, 0.0)
    tally = LabelTally(2)
    tally.add(torch.tensor([[float("nan"), 0.0], [1.0, 0.0]]), torch.tensor([[0, 1], [1, 0]]))
    assert math.isnan(tally.metrics().loss)


def labels_of(rank, logits, labels):
    tally = LabelTally(5)
    if rank < 2:  # the third has no image
        tally.add(logits[rank * 100 : rank * 100 + 100], labels[rank * 100 : rank * 100 + 100])
    tally.merge()
    return tally.metrics()


def test_three_ragged_ranks_have_the_metrics_of_labels_of_one(label_predictions, tmp_path):
    found = run_ranks(3, labels_of, tmp_path, *label_predictions)
    assert found == [label_metrics(*label_predictions, [151])] * 3
