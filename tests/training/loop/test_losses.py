"""The loss of images with any number of labels: against its formula, and the same on any number of ranks."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.launch import start_accelerator
from bnfinetune.training.loop.gradients import Gradients
from bnfinetune.training.loop.losses import build_loss
from tests.bn.distributed import run_ranks
from tests.training.loop.test_gradients import SHARES, network

MULTILABEL = {"data.task": "multilabel"}


def by_hand(logits, targets, smoothing):
    """Minus the mean of t log p + (1 - t) log(1 - p)."""
    targets = targets * (1 - smoothing) + 0.5 * smoothing
    p = 1 / (1 + torch.exp(-logits))
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_its_formula(smoothing, mixed):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.uint8)
    targets = torch.lerp(targets.double(), targets.flip(0).double(), 0.3) if mixed else targets
    recipe = load_recipe({}, MULTILABEL | {"train.label_smoothing": smoothing})
    found = build_loss(recipe, mixed=mixed)(logits, targets)
    torch.testing.assert_close(found, by_hand(logits, targets.double(), smoothing), rtol=1e-12, atol=0)


def batches(sizes):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(sum(sizes), 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = (torch.rand(sum(sizes), 3, generator=generator) < 0.4).to(torch.uint8)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def gradients_of(rank, shares):
    recipe = load_recipe("freeze_bn", MULTILABEL)
    model = network("test_resnet")
    first = sum(map(len, shares[:rank]))
    mine = batches([size for share in shares for size in share])[first : first + len(shares[rank])]
    gradients, loss_of = Gradients(recipe, start_accelerator()), build_loss(recipe, mixed=False)
    forward = DistributedDataParallel(model, broadcast_buffers=False)
    loss = gradients.compute(
        forward, mine, gradients.count(mine), lambda batch, _: batch, lambda piece: loss_of(forward(piece[0]), piece[1])
    )
    return float(loss), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shares", ["3 + 2", "three ranks, two micro-batches"])
def test_ragged_batches_of_several_ranks_equal_one_process(shares, tmp_path):
    sizes = SHARES[shares]
    model = network("test_resnet")
    images, labels = (torch.cat(part) for part in zip(*batches([n for each in sizes for n in each]), strict=True))
    expected = by_hand(model(images), labels.double(), 0.0)
    expected.backward()
    found = run_ranks(len(sizes), gradients_of, tmp_path, sizes)
    assert sum(loss for loss, _ in found) / len(found) == pytest.approx(expected.item(), abs=1e-6)
    for _, gradients in found:
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-12, atol=1e-12, msg=key)
