"""What ordinary loops do on purpose is not reported: each of these was once a false alarm."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    WeightedRandomSampler,
    random_split,
)

import bnfinetune as bnf
from tests.diagnose.support import FAMILIES, codes, group_on_cpu, loader, network


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


# loaders


class Unlabelled(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), index // 8


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3, 8, 8), 0)] * 40)


def prepared(data):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_data_loader(data)


def sharded(data, ranks=2, **options):
    """What Accelerate makes of a loader on the first of some processes."""
    from accelerate.data_loader import prepare_data_loader

    options |= {"device": torch.device("cpu"), "put_on_device": True}
    return prepare_data_loader(data, num_processes=ranks, process_index=0, **options)


SHUFFLED = {
    "shuffle": lambda: DataLoader(Unlabelled(), batch_size=8, shuffle=True),
    "weighted": lambda: DataLoader(Unlabelled(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 40)),
    "distributed": lambda: DataLoader(
        Unlabelled(), batch_size=8, sampler=DistributedSampler(Unlabelled(), num_replicas=2, rank=0)
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=8),
}
ORDERED = {
    "sequential": lambda: DataLoader(Unlabelled(), batch_size=8),
    "distributed": lambda: DataLoader(
        Unlabelled(), batch_size=8, sampler=DistributedSampler(Unlabelled(), num_replicas=2, rank=0, shuffle=False)
    ),
}
WRAPPERS = {
    "plain": lambda data: data,
    "prepared": prepared,
    "sharded": sharded,
    "seedable": lambda data: sharded(data, use_seedable_sampler=True),
    "dispatched": lambda data: sharded(data, dispatch_batches=True),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", SHUFFLED)
def test_loaders_that_shuffle_below_their_wrappers(name, kind, wrapper):
    data = WRAPPERS[wrapper](SHUFFLED[kind]())
    assert not codes(bnf.check_bn(network(name), loader=data)) & {"BN205", "BN208"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ORDERED)
def test_wrappers_do_not_hide_stored_order(name, kind, wrapper):
    data = WRAPPERS[wrapper](ORDERED[kind]())
    assert "BN208" in codes(bnf.check_bn(network(name), loader=data))


def test_a_part_drawn_at_random_is_in_no_stored_order(name):
    part, _ = random_split(Unlabelled(), [32, 8], torch.Generator().manual_seed(0))
    assert "BN208" not in codes(bnf.check_bn(network(name), loader=DataLoader(part, batch_size=8)))
    first = torch.utils.data.Subset(Unlabelled(), range(32))
    assert "BN208" in codes(bnf.check_bn(network(name), loader=DataLoader(first, batch_size=8)))


def one_too_many(**options):
    return loader(41, batch_size=8, **options)


def test_a_prepared_loader_still_drops_its_last_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.BatchNorm1d(4))
    options = {"input_size": (3, 8, 8)}
    assert "BN205" in codes(bnf.check_bn(model, loader=prepared(one_too_many(size=8)), **options))
    assert "BN205" not in codes(bnf.check_bn(model, loader=prepared(one_too_many(size=8, drop_last=True)), **options))
    assert "BN205" not in codes(bnf.check_bn(model, loader=sharded(one_too_many(size=8)), **options))  # filled up


# sizes


@pytest.mark.parametrize(("train", "evaluated"), [(176, 224), (224, 288), (128, 160), (160, 160)])
def test_evaluation_somewhat_larger_than_training_is_chosen(name, train, evaluated):
    assert "BN210" not in codes(bnf.check_bn(network(name), train_size=train, eval_size=evaluated))


@pytest.mark.parametrize(("train", "evaluated"), [(224, 176), (160, 224), (288, 224)])
def test_other_differences_of_size_are_not(name, train, evaluated):
    assert "BN210" in codes(bnf.check_bn(network(name), train_size=train, eval_size=evaluated))


def test_watched_sizes_are_judged_alike(name):
    def watch(size):
        model = network(name)
        with bnf.watch_bn(model, rerun=False) as watching:
            model(torch.randn(4, 3, 40, 40)).sum().backward()
            with torch.no_grad():
                model.eval()(torch.randn(4, 3, size, size))
            model.train()
        return codes(watching.findings)

    assert "BN210" not in watch(48)
    assert "BN210" in watch(32)


# devices


def test_synchronised_layers_may_still_move(name):
    model = timm.layers.convert_sync_batchnorm(network(name))
    assert "BN404" not in codes(bnf.check_bn(model))  # before model.to("cuda")
    with group_on_cpu():
        assert "BN404" in codes(bnf.check_bn(model))
