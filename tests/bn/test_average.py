"""Averages of networks: weights against plain float64 means, statistics against plain batch normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bnfinetune.bn import average_networks, find_bn_layers, freeze_bn
from bnfinetune.bn.average import mean_of_states
from bnfinetune.errors import CheckpointError, StatisticsError
from tests.bn.models import differing, images, tensors_of

KINDS = {"plain": nn.BatchNorm2d, "fused": BatchNormAct2d}


@pytest.fixture(params=KINDS)
def model(request):
    bn = KINDS[request.param]
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), bn(4), nn.Conv2d(4, 6, 3), bn(6), nn.Flatten(), nn.LazyLinear(2)).eval()


def trained(model, seed, *, statistics=True):
    """Another network near the model: other weights and, unless left out, other statistics."""
    model(images(2, 8))
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.3 * torch.randn(p.shape, generator=draw)
        for layer in find_bn_layers(other).values() if statistics else ():
            layer.running_mean += torch.randn(layer.running_mean.shape, generator=draw)
            layer.running_var *= 1 + torch.rand(layer.running_var.shape, generator=draw)
            layer.num_batches_tracked += seed
    return other


def states_of(*networks):
    return [network.state_dict() for network in networks]


def oracle(networks, batch):
    """The average with plain parameters, whose statistics come from torch's own training mode on one batch."""
    plain = copy.deepcopy(networks[0]).double()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(sum(network.get_parameter(name).double() for network in networks) / len(networks))
    for layer in find_bn_layers(plain).values():
        layer.momentum = 1.0
    plain.train()(batch.double())
    return plain.eval()


def test_weights_are_the_mean_and_statistics_those_of_the_average(model):
    networks, batch = [trained(model, seed) for seed in (1, 2, 3)], images(16, 8)
    report = average_networks(model, iter(states_of(*networks)), [batch])
    truth = oracle(networks, batch)
    assert report.samples == 16
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), truth.get_parameter(name), rtol=1e-6, atol=1e-7)
    for name, layer in find_bn_layers(model).items():
        values, n = truth.get_submodule(name), 16 * (6 * 6 if name == "1" else 4 * 4)
        torch.testing.assert_close(layer.running_mean.double(), values.running_mean, rtol=1e-5, atol=1e-6)
        biased = values.running_var * (n - 1) / n
        torch.testing.assert_close(layer.running_var.double(), biased, rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == 3  # of the last
    mean = sum(network.state_dict()["3.running_var"] for network in networks) / 3
    assert not torch.allclose(model[3].running_var, mean, rtol=0.1)  # averaged buffers would be wrong


def test_statistics_in_which_all_agree_stay_to_the_bit_and_nothing_is_read(model):
    networks = [trained(freeze_bn(model), seed, statistics=False) for seed in (1, 2)]
    kept = {key: value for key, value in tensors_of(model).items() if "running" in key or "tracked" in key}

    def unread():
        raise AssertionError("read")
        yield

    assert average_networks(model, states_of(*networks), unread()) is None
    assert not differing({key: tensors_of(model)[key] for key in kept}, kept)
    assert differing(tensors_of(model), tensors_of(networks[0]))


def test_only_layers_that_moved_are_computed_anew(model):
    networks = [trained(model, seed) for seed in (1, 2)]
    networks[1][1].load_state_dict({**networks[1][1].state_dict(), **_statistics(networks[0][1])})
    report = average_networks(model, states_of(*networks), [images(8, 8)])
    assert list(report.layers) == ["3"]
    assert torch.equal(model[1].running_mean, networks[0][1].running_mean)


def _statistics(layer):
    return {key: value for key, value in layer.state_dict().items() if "running" in key}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_mean_of_equals_is_they_to_the_bit_and_order_does_not_matter(model, dtype):
    first, second = (trained(model, seed).to(dtype) for seed in (1, 2))
    assert not differing(mean_of_states(states_of(first, first, first)).state, first.state_dict())
    forth, back = (mean_of_states(states_of(*pair)).state for pair in ((first, second), (second, first)))
    moved = {key for key in forth if not torch.equal(forth[key], back[key])}
    assert moved == {"1.num_batches_tracked", "3.num_batches_tracked"}  # which count, and are not averaged
    assert all(forth[key].dtype == value.dtype for key, value in first.state_dict().items())


def test_a_pass_that_fails_leaves_the_model_as_it_was(model):
    networks = [trained(model, seed) for seed in (1, 2)]
    before = {key: value.clone() for key, value in tensors_of(model).items()}
    with pytest.raises(StatisticsError, match="finite"):
        average_networks(model, states_of(*networks), [images(8, 8) * float("nan")])
    assert not differing(tensors_of(model), before)


def test_networks_of_another_kind_are_refused_by_the_tensor_that_differs(model):
    first = trained(model, 1).state_dict()
    wider = {**first, "2.weight": torch.zeros(7, 4, 3, 3)}
    lacking = {key: value for key, value in first.items() if key != "3.bias"}
    for other, message in (
        (wider, r"2.weight is \(6, 4, 3, 3\) in the first and \(7, 4, 3, 3\) in number 2"),
        (lacking, r"3.bias is \(6,\) in the first and absent in number 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            average_networks(model, [first, other], [])
    with pytest.raises(CheckpointError, match="nothing to average"):
        average_networks(model, [], [])
