"""Weight and bias are frozen where they live, whoever keeps them elsewhere, before the policy or after it."""

import copy
import io

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from bnfinetune.bn import (
    BNPolicy,
    apply_policy,
    describe_bn,
    domain,
    freeze_bn,
    load_policy_state,
    policy_state,
    restore_bn,
    unfreeze_bn,
)
from bnfinetune.errors import LayerError, PolicyError
from tests.bn.models import images, randomise, toy

NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, weight):
        return weight * self.gain


class Positive(nn.Module):
    def forward(self, weight):
        return weight.exp()

    def right_inverse(self, weight):
        return weight.log()


def by_hand(layer):
    """A weight that a user's own hook computes from a Parameter of another name."""
    layer.gain = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    del layer.weight
    layer.register_forward_pre_hook(lambda layer, args: setattr(layer, "weight", layer.gain * 1))
    layer.weight = layer.gain * 1


WAYS = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: [prune.random_unstructured(layer, "weight", 0.3) for _ in range(2)],
    "bias pruned": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrised weight_norm": parametrizations.weight_norm,
    "parametrised spectral_norm": parametrizations.spectral_norm,
    "right inverse": lambda layer: parametrize.register_parametrization(layer, "weight", Positive()),
    "learnt parametrisation": lambda layer: parametrize.register_parametrization(layer, "weight", Gain()),
    "bias parametrised": lambda layer: parametrize.register_parametrization(layer, "bias", Gain()),
    "parametrised and pruned": lambda layer: prune.l1_unstructured(
        parametrize.register_parametrization(layer, "weight", Gain()).parametrizations.weight, "original", 0.5
    ),
    "own hook": by_hand,
}


def single(norm: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(randomise(norm(6)))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@NORMS
@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("way", WAYS)
def test_what_weight_and_bias_are_computed_from_is_frozen(norm, way, first):
    model = single(norm)
    if first == "theirs":
        WAYS[way](model[0])
    step(model, early := torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    early.state.clear()
    freeze_bn(model).train()
    if first == "ours":
        WAYS[way](model[0])
    row = describe_bn(model)[0]
    assert (row.affine, row.affine_grad) == ("frozen", "no")
    before = values(model)
    step(model, early, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())

    for thawed in (unfreeze_bn(model), restore_bn(freeze_bn(model))):
        row = describe_bn(thawed)[0]
        assert (row.affine, row.affine_grad) == ("trained", "yes")
        assert all(parameter.requires_grad for parameter in model.parameters())
    step(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


@NORMS
@pytest.mark.parametrize("way", WAYS)
def test_which_of_it_learnt_comes_back(norm, way):
    model = single(norm)
    WAYS[way](model[0])
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    freeze_bn(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unfreeze_bn(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning
    apply_policy(freeze_bn(model), BNPolicy(affine="trained"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    restore_bn(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning


REMOVALS = {
    "pruned": lambda layer: prune.remove(layer, "weight"),
    "weight_norm": lambda layer: torch.nn.utils.remove_weight_norm(layer),
    "spectral_norm": lambda layer: torch.nn.utils.remove_spectral_norm(layer),
    "parametrised weight_norm": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    "learnt parametrisation": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
}


@NORMS
@pytest.mark.parametrize("way", REMOVALS)
def test_a_weight_that_comes_back_to_its_place_is_frozen_there(norm, way):
    model = single(norm)
    WAYS[way](model[0])
    freeze_bn(model).train()
    step(model)
    REMOVALS[way](model[0])
    assert describe_bn(model)[0].affine == "frozen"
    before, weight = values(model), model[0].weight.detach().clone()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
    assert model[0].weight.equal(weight)
    restore_bn(model)
    assert [name for name, _ in model[0].named_parameters()] in (["weight", "bias"], ["bias", "weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())


@NORMS
def test_a_new_weight_in_the_place_of_a_frozen_one_is_frozen(norm):
    model = freeze_bn(single(norm))
    model[0].weight = nn.Parameter(torch.full((6,), 2.0))
    assert describe_bn(model)[0].affine == "frozen"
    assert not model[0].weight.requires_grad
    assert restore_bn(model)[0].weight.requires_grad


@NORMS
def test_spectral_normalisation_does_not_move_when_it_is_looked_at(norm):
    model = single(norm)
    twin = single(norm)
    for each in (model, twin):
        spectral_norm(each[0])
        parametrize.register_parametrization(each[0], "bias", Gain())
        each.train()
    state = copy.deepcopy(model.state_dict())
    freeze_bn(model), describe_bn(model), unfreeze_bn(model)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


@NORMS
@pytest.mark.parametrize("way", ["pruned", "learnt parametrisation", "weight_norm"])
def test_a_domains_own_affine_is_frozen_where_it_lives(norm, way):
    model = apply_policy(single(norm), BNPolicy(domains="b", domain_affine="own"))
    {
        "pruned": lambda: prune.l1_unstructured(model[0], "bn_b_weight", 0.5),
        "learnt parametrisation": lambda: parametrize.register_parametrization(model[0], "bn_b_weight", Gain()),
        "weight_norm": lambda: weight_norm(model[0], "bn_b_weight"),
    }[way]()
    freeze_bn(model).train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = values(model)
    with domain(model, "b"):
        step(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
    unfreeze_bn(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    if way != "weight_norm":
        with pytest.raises(
            LayerError, match=r"BN layer '0' computes 'bn_b_weight', which goes away, from others; undo"
        ):
            restore_bn(model)
        undo = {"pruned": prune.remove, "learnt parametrisation": parametrize.remove_parametrizations}[way]
        undo(model[0], "bn_b_weight")
        assert sorted(dict(restore_bn(model)[0].named_parameters())) == ["bias", "weight"]


def tied(norm) -> nn.Sequential:
    model = toy(norm)
    model[4].weight = model[1].weight
    return model


@NORMS
def test_one_weight_in_two_layers_is_undone_to_what_it_was_first(norm):
    for restored in ("*", "4"):
        model = tied(norm)
        freeze_bn(freeze_bn(model, layers="1"), layers="4")
        row = {row.name: row.affine_grad for row in describe_bn(model)}
        assert row == {"1": "no", "4": "no"}
        restore_bn(model if restored == "*" else model[4])
        assert model[4].weight.requires_grad
        assert model[4].bias.requires_grad
    model = tied(norm)
    model[1].weight.requires_grad_(False)
    apply_policy(model, BNPolicy(affine="trained", layers="1"))
    freeze_bn(model)
    restore_bn(model)
    assert not model[1].weight.requires_grad
    assert model[1].bias.requires_grad


@NORMS
def test_one_weight_cannot_learn_in_one_layer_and_be_frozen_in_another(norm):
    model = freeze_bn(tied(norm), layers="1")
    assert {row.name: row.affine_grad for row in describe_bn(model)} == {"1": "no", "4": "no/yes"}
    with pytest.raises(PolicyError, match=r"BN layer '4' shares its weight or bias with '1', which is frozen"):
        apply_policy(model, BNPolicy(affine="trained", layers="4"))
    assert not model[4].weight.requires_grad
    apply_policy(model, BNPolicy(train_stats="ghost", ghost_size=2, layers="4"))  # says nothing of the affine
    assert not model[4].weight.requires_grad
    unfreeze_bn(model)
    assert model[4].weight.requires_grad


@NORMS
@pytest.mark.parametrize("way", ["pruned", "weight_norm", "learnt parametrisation", "parametrised weight_norm"])
def test_a_policy_state_carries_it(norm, way):
    models = [single(norm) for _ in range(2)]
    for model in models:
        WAYS[way](model[0])
    freeze_bn(models[0])
    file = io.BytesIO()
    torch.save(policy_state(models[0]), file)
    file.seek(0)
    load_policy_state(models[1], torch.load(file, weights_only=True))
    assert describe_bn(models[1]) == describe_bn(models[0])
    assert not any(parameter.requires_grad for parameter in models[1].parameters())
    unfreeze_bn(models[1])
    assert all(parameter.requires_grad for parameter in models[1].parameters())


def test_a_gradient_left_on_what_did_not_learn_is_dropped_too():
    model = toy()
    model(images(size=12)).sum().backward()
    model[1].weight.requires_grad_(False)
    freeze_bn(model)
    assert model[1].weight.grad is None
