"""update_bn_stats and get_bn_modules keep the contract of fvcore's functions of these names, and mend their faults."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bnfinetune.bn import find_bn_layers, freeze_bn
from bnfinetune.bn.statistics.fvcore import get_bn_modules, update_bn_stats
from bnfinetune.errors import ShortDataError
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of, toy

SHAPES = {nn.BatchNorm1d: (24,), nn.BatchNorm2d: (24, 8), nn.BatchNorm3d: (4, 12, 6)}


@pytest.mark.parametrize("norm", SHAPES)
@pytest.mark.parametrize("sizes", [[16] * 8, [2, 2, 4, 8, 16, 32, 64]])
def test_statistics_are_those_of_all_values_however_split(norm, sizes):
    data = torch.randn(128, 8, *SHAPES[norm], generator=torch.Generator().manual_seed(42))
    model = norm(8)
    dims = [0, *range(2, data.ndim)]
    update_bn_stats(model, itertools.cycle(data.split(sizes)), len(sizes))
    torch.testing.assert_close(model.running_mean, data.mean(dims), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(model.running_var, data.var(dims, correction=0), rtol=1e-5, atol=1e-8)
    assert torch.equal(model.weight, torch.ones(8))
    assert model.momentum == 0.1
    assert model.training


def test_a_short_loader_raises_an_assertion_error_and_leaves_the_model_alone():
    model = nn.BatchNorm2d(3)
    before = tensors_of(model)
    with pytest.raises(AssertionError, match="10 batches, before num_batches=20") as caught:
        update_bn_stats(model, itertools.repeat(images(4), 10), 20, progress=None)
    assert isinstance(caught.value, ShortDataError)
    assert not differing(tensors_of(model), before)
    assert model.momentum == 0.1
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", BACKBONES)
def test_results_equal_fvcores(name):
    theirs = pytest.importorskip("fvcore.nn")
    model = backbone(name)
    find_bn_layers(model)[next(iter(find_bn_layers(model)))].eval()
    twin, data = copy.deepcopy(model), [images(n, 64, n) for n in (4, 6, 5)]
    assert [type(m) for m in get_bn_modules(model)] == [type(m) for m in theirs.get_bn_modules(twin)]
    for function, net in ((update_bn_stats, model), (theirs.update_bn_stats, twin)):
        torch.manual_seed(0)  # for dropout, which stays on
        function(net, iter(data), 3)
    ours, fvcores = tensors_of(model), tensors_of(twin)
    for key, value in ours.items():
        torch.testing.assert_close(value, fvcores[key], rtol=1e-4, atol=1e-5, msg=key)
    assert all(a.training == b.training for a, b in zip(model.modules(), twin.modules(), strict=True))


def test_exactly_num_iters_batches_are_read():
    source = iter([images()] * 5)
    update_bn_stats(toy(), source, 3)
    assert len(list(source)) == 2


def test_batches_reach_the_model_unchanged():
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, batch):
            seen.append(batch)
            return self.norm(batch["image"])

    batches = [{"image": images(), "name": "a"}, {"image": images(seed=1), "name": "b"}]
    update_bn_stats(Model(), batches, 2)
    assert all(given is got for given, got in zip(batches, seen, strict=True))


def test_only_layers_in_training_mode_are_updated_and_modes_stay():
    model = toy(BatchNormAct2d)
    model[1].eval()
    before = tensors_of(model)
    update_bn_stats(model, [images()], 1)
    assert set(differing(tensors_of(model), before)) == {"4.running_mean", "4.running_var", "4.num_batches_tracked"}
    assert [module.training for module in model] == [True, False, True, True, True]
    assert get_bn_modules(model) == [model[4]]


def test_layers_frozen_by_a_policy_are_left_out():
    model = toy()
    freeze_bn(model, layers="1")
    assert get_bn_modules(model) == [model[4]]


@pytest.mark.parametrize("build", [lambda: toy().eval(), lambda: nn.Sequential(nn.Conv2d(3, 3, 1))])
def test_nothing_to_update_is_a_warning(build):
    model = build()
    before = tensors_of(model)
    assert get_bn_modules(model) == []
    with pytest.warns(UserWarning, match="no BN layer in training mode") as caught:
        update_bn_stats(model, [images()], 1)
    assert caught[0].filename == __file__
    assert not differing(tensors_of(model), before)


def test_what_fvcore_gets_wrong():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = nn.BatchNorm2d(3)
            self.never = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.twice(self.twice(x))

    model, mean = Model(), torch.full((3,), 7.0)
    model.never.running_mean.copy_(mean)
    buffer = model.twice.running_var
    update_bn_stats(model, [100 + 0.01 * images()], 1)
    assert torch.equal(model.never.running_mean, mean)  # there: zero
    assert torch.equal(model.never.running_var, torch.ones(3))  # there: zero
    assert model.twice.running_var is buffer  # there: another object, which DDP no longer keeps in step
    assert (model.twice.running_var > 0).all()  # there: an assertion, or a negative variance
    assert model.twice.num_batches_tracked == 2
