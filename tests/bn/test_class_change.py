"""Classes changed in place stay independent of what others do to the class, in either order."""

import copy
import types

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrize, prune

from bnfinetune.bn import freeze_bn, restore_bn
from bnfinetune.bn.class_change import has_foreign_forward
from tests.bn.models import randomise

NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def batch() -> torch.Tensor:
    return torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def single(norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(randomise(norm(6))).double()


@NORMS
@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("undone_first", ["theirs", "ours"])
def test_parametrisations_and_policies_come_and_go_in_any_order(norm, first, undone_first):
    model = single(norm)
    plain = copy.deepcopy(model).eval()(batch())
    parametrised = copy.deepcopy(model)
    parametrize.register_parametrization(parametrised[0], "weight", Doubled())
    wanted = parametrised.eval()(batch())

    def put_on_theirs() -> None:
        parametrize.register_parametrization(model[0], "weight", Doubled())

    steps = [put_on_theirs, lambda: freeze_bn(model)]
    for step in steps if first == "theirs" else reversed(steps):
        step()
    torch.testing.assert_close(model.train()(batch()), wanted)
    if undone_first == "theirs":
        parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
        torch.testing.assert_close(model.train()(batch()), plain)
        restore_bn(model)
    else:
        restore_bn(model)
        torch.testing.assert_close(model.eval()(batch()), wanted)
        parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert type(model[0]) is norm
    torch.testing.assert_close(model.eval()(batch()), plain)


@NORMS
def test_a_parametrised_layer_gets_its_very_class_back(norm):
    model = single(norm)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    before = type(model[0])
    restore_bn(freeze_bn(model))
    assert type(model[0]) is before


@NORMS
def test_copies_of_a_parametrised_layer_under_a_policy_compute_the_same(norm):
    model = single(norm)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    twin = copy.deepcopy(freeze_bn(model)).train()
    torch.testing.assert_close(twin(batch()), model.train()(batch()))


@NORMS
def test_a_forward_kept_on_the_layer_follows_the_class(norm):
    model = single(norm)
    plain = copy.deepcopy(model).eval()(batch())
    model[0].forward = types.MethodType(norm.forward, model[0])  # as accelerate leaves it when it takes its hooks off
    freeze_bn(model).train()
    torch.testing.assert_close(model(batch()), plain)
    restore_bn(model)
    torch.testing.assert_close(model.eval()(batch()), plain)


@NORMS
def test_a_foreign_forward_is_told_from_a_kept_one(norm):
    layer = norm(6)
    assert not has_foreign_forward(layer)
    layer.forward = types.MethodType(norm.forward, layer)
    assert not has_foreign_forward(layer)
    layer.forward = lambda x: x
    assert has_foreign_forward(layer)


@NORMS
def test_pruning_before_and_after_a_policy(norm):
    model = single(norm)
    prune.l1_unstructured(model[0], "weight", 0.5)
    wanted = model.eval()(batch()).detach()
    freeze_bn(model).train()
    torch.testing.assert_close(model(batch()), wanted)
    prune.remove(model[0], "weight")
    torch.testing.assert_close(model(batch()), wanted)
    assert type(restore_bn(model)[0]) is norm
