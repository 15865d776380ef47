"""Absorbing keeps the function and the names; what trains afterwards trains as the weights of a fused network do."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, freeze_bn
from bnfinetune.bn.absorb import absorb_bn
from bnfinetune.bn.folding.fold import fold_bn, fold_report
from bnfinetune.bn.folding.fuse import fuse_bn
from bnfinetune.errors import LayerError, PolicyError
from tests.bn.models import BACKBONES, backbone, images, randomise, toy

EXAMPLE = images(1)


@pytest.mark.parametrize("name", [*BACKBONES, "resnetv2_18"])
def test_the_function_and_the_names_stay(name):
    model = freeze_bn(randomise(timm.create_model(name, num_classes=5))).double()
    before, parameters, x = copy.deepcopy(model), list(model.parameters()), images(2).double()
    assert absorb_bn(model, EXAMPLE) is model
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    torch.testing.assert_close(model(x), before(x), rtol=1e-10, atol=1e-10)
    again = timm.create_model(name, num_classes=5).double()
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(again.eval()(x), before(x), rtol=1e-10, atol=1e-10)
    fold_bn(model, EXAMPLE)
    torch.testing.assert_close(model(x), before(x), rtol=1e-10, atol=1e-10)


def toy_of(norm, biased: bool) -> nn.Module:
    model = toy(norm).double()
    for conv in (model[0], model[3]):
        conv.bias = conv.bias if biased else None
    return model


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_it_trains_as_the_fused_network_does(norm, biased):
    absorbed = fold_bn(absorb_bn(freeze_bn(toy_of(norm, biased)), EXAMPLE), EXAMPLE)
    models = fuse_bn(toy_of(norm, biased), EXAMPLE), absorbed
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            model(images(seed=seed).double()).square().mean().backward()
            optimizer.step()
    fused = models[0]
    for conv, layer in (("0", "1"), ("3", "4")):
        torch.testing.assert_close(absorbed.get_submodule(conv).weight, fused.get_submodule(conv).weight)
        owner = absorbed.get_submodule(conv if biased else layer)
        torch.testing.assert_close(owner.bias, fused.get_submodule(conv).bias)
        assert not absorbed.get_submodule(layer).weight.requires_grad
    assert fold_report(absorbed).folded == ["1", "4"]


def test_what_learnt_nothing_learns_nothing():
    model = freeze_bn(backbone("resnet18"))
    model.layer1.requires_grad_(False)
    absorb_bn(model, EXAMPLE)
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert model.layer2[0].conv1.weight.requires_grad
    assert model.layer2[0].bn1.bias.requires_grad
    assert not model.layer2[0].bn1.weight.requires_grad


def test_errors_name_the_layer():
    with pytest.raises(PolicyError, match=r"'bn1' has no fixed statistics to absorb \(batch, ema.*freeze_bn"):
        absorb_bn(backbone("resnet18"), EXAMPLE)
    half = apply_policy(backbone("resnet18"), BNPolicy(train_stats="running", update_stats="none", layers="bn1"))
    with pytest.raises(PolicyError, match="layer1"):
        absorb_bn(half, EXAMPLE)
    domains = freeze_bn(apply_policy(toy(), BNPolicy(domains=("a", "b"))))
    with pytest.raises(PolicyError, match="'1' has statistics of several domains"):
        absorb_bn(domains, EXAMPLE)
    bare = freeze_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    with pytest.raises(LayerError, match="'1' has no weight and bias"):
        absorb_bn(bare, EXAMPLE)
