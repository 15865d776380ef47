import numpy as np
import pytest
import torch
from timm.data import Mixup

from bnfinetune.recipe import Augment
from bnfinetune.training.data import build_mixup


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(size, 3, 8, 8, generator=generator), torch.arange(size) % 5


def test_off_by_default():
    assert build_mixup(Augment(), 5, 0.1, seed=1) is None


@pytest.mark.parametrize("augment", [Augment(mixup=0.4), Augment(cutmix=1.0), Augment(mixup=0.4, cutmix=1.0)])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_targets_are_the_shares_of_the_images(augment, size):
    mixup = build_mixup(augment, 5, 0.0, seed=3)
    images, labels = batch(size)
    original = images.clone()
    constant = torch.nn.functional.one_hot(labels, 5).float()[:, :, None, None].expand(-1, -1, 8, 8).clone()
    mixed, targets = mixup(images, labels, 2, 9)
    shares, _ = mixup(constant, labels, 2, 9)  # the class of every pixel, mixed alike
    assert torch.allclose(shares.mean((2, 3)), targets, atol=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(size))
    assert size == 1 or not torch.equal(mixed, original)


@pytest.mark.parametrize("domains", [None, torch.tensor([0, 1, 0, 1, 1])])
def test_targets_of_several_labels_are_the_shares_of_the_images(domains):
    mixup = build_mixup(Augment(mixup=0.4, cutmix=1.0), 5, 0.1, seed=3)
    images = batch(5)[0]
    labels = (torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.4).to(torch.uint8)
    constant = labels.float()[:, :, None, None].expand(-1, -1, 8, 8).clone()
    _, targets = mixup(images, labels, 2, 9, domains)
    shares, _ = mixup(constant, labels, 2, 9, domains)
    assert torch.allclose(shares.mean((2, 3)), targets, atol=1e-6)
    assert not torch.equal(targets, labels.float())


def test_same_as_timms_own_draws():
    augment = Augment(mixup=0.4, cutmix=1.0, mix_prob=0.7)
    ours = build_mixup(augment, 5, 0.1, seed=3)
    theirs = Mixup(0.4, 1.0, prob=0.7, label_smoothing=0.1, num_classes=5)
    from bnfinetune.training.data.seeding import derive_seed

    for number in range(8):
        images, labels = batch(6)
        got = ours(images.clone(), labels, 1, number)
        np.random.seed(derive_seed(3, 3, 1, number, 0) & 0xFFFFFFFF)
        expected = theirs(images, labels)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_a_batch_is_mixed_alike_whatever_came_before():
    mixup = build_mixup(Augment(mixup=0.4, cutmix=1.0), 5, 0.1, seed=3)
    images, labels = batch(6)
    first = mixup(images.clone(), labels, 1, 4)
    np.random.seed(0)
    mixup(images.clone(), labels, 1, 5)
    again = mixup(images.clone(), labels, 1, 4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_seed_epoch_batch_and_rank_all_count():
    images, labels = batch(6)
    results = []
    for seed, epoch, number, rank in [(3, 1, 4, 0), (4, 1, 4, 0), (3, 2, 4, 0), (3, 1, 5, 0), (3, 1, 4, 1)]:
        mixup = build_mixup(Augment(mixup=0.4), 5, 0.0, seed=seed, rank=rank)
        results.append(mixup(images.clone(), labels, epoch, number)[0])
    assert len({tuple(result.flatten().tolist()) for result in results}) == 5


def test_global_generator_is_left_alone():
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    build_mixup(Augment(mixup=0.4), 5, 0.0, seed=3)(*batch(4), 0, 0)
    assert np.array_equal(np.random.rand(3), expected)


@pytest.mark.parametrize("augment", [Augment(mixup=0.4), Augment(cutmix=1.0), Augment(mixup=0.4, cutmix=1.0)])
@pytest.mark.parametrize("layout", [[0, 1, 0, 1, 0, 1, 1], [0, 0, 0], [2, 0, 1, 2]])
def test_domains_are_mixed_among_themselves(augment, layout):
    domains = torch.tensor(layout)
    mixup = build_mixup(augment, 5, 0.0, seed=3)
    images, labels = batch(len(layout))
    of_domain = torch.nn.functional.one_hot(domains, 3).float()[:, :, None, None].expand(-1, -1, 8, 8).clone()
    mixed, _ = mixup(of_domain.clone(), labels, 2, 9, domains)
    assert torch.allclose(mixed, of_domain, atol=1e-6)  # every pixel is still of its own domain
    constant = torch.nn.functional.one_hot(labels, 5).float()[:, :, None, None].expand(-1, -1, 8, 8).clone()
    shares, targets = mixup(constant, labels, 2, 9, domains)
    assert torch.allclose(shares.mean((2, 3)), targets, atol=1e-6)
    assert not torch.equal(mixup(images.clone(), labels, 2, 9, domains)[0], images)
