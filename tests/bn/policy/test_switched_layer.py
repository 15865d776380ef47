"""A layer taken over in place: same object, same tensors, and honest about what it does."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnfinetune.bn import (
    BNPolicy,
    apply_policy,
    domain,
    find_bn_layers,
    freeze_bn,
    frozen,
    load_policy_state,
    no_stat_updates,
    policy_state,
    precise_bn,
    register_bn_class,
    restore_bn,
    unfreeze_bn,
)
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.errors import LayerError
from tests.bn.models import BACKBONES, backbone, images, randomise, tensors_of, toy

NATIVE = {
    nn.BatchNorm2d: ("batch", "ema", "trained", "running"),
    BatchNormAct2d: ("batch", "ema", "trained", "running"),
    nn.SyncBatchNorm: ("sync", "ema", "trained", "running"),
    SyncBatchNormAct: ("sync", "ema", "trained", "running"),
    FrozenBatchNorm2d: ("running", "none", "frozen", "running"),
    FrozenBatchNormAct2d: ("running", "none", "frozen", "running"),
}


@pytest.mark.parametrize("cls", NATIVE, ids=lambda cls: cls.__name__)
def test_native_layers_say_what_they_do_in_either_mode(cls):
    assert switches_of(cls(4).train()) == NATIVE[cls]
    assert switches_of(cls(4).eval()) == NATIVE[cls]


def test_attributes_are_read_as_what_they_effect():
    assert switches_of(nn.BatchNorm2d(4, momentum=None)).update_stats == "cumulative"
    assert switches_of(nn.BatchNorm2d(4, affine=False)).affine == "frozen"
    assert switches_of(nn.BatchNorm2d(4, track_running_stats=False)) == ("batch", "none", "trained", "batch")
    flipped = nn.BatchNorm2d(4)
    flipped.track_running_stats = False
    assert switches_of(flipped) == ("batch", "none", "trained", "running")


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_stay_the_same_objects_of_their_class(name):
    model = backbone(name)
    layers, parameters = find_bn_layers(model), list(model.parameters())
    types = {layer_name: type(layer) for layer_name, layer in layers.items()}
    apply_policy(model, BNPolicy(train_stats="ghost", eval_stats="mix"))
    assert all(layer is layers[layer_name] for layer_name, layer in find_bn_layers(model).items())
    assert all(isinstance(layer, types[layer_name]) for layer_name, layer in layers.items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    restore_bn(model)
    assert {layer_name: type(layer) for layer_name, layer in layers.items()} == types


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", BACKBONES)
def test_copies_keep_the_policy_and_go_their_own_way(name, copied):
    policy = BNPolicy(
        train_stats="stochastic", update_stats="cumulative", affine="frozen", eval_stats="mix", mix_prior=3
    )
    model = apply_policy(backbone(name), policy)
    twin = copied(model)
    for training in (True, False):
        outputs = []
        for each in (model.train(training), twin.train(training)):
            torch.manual_seed(1)
            outputs.append(each(images()))
        assert outputs[0].equal(outputs[1])
    assert [switches_of(layer) for layer in find_bn_layers(twin).values()] == [
        switches_of(layer) for layer in find_bn_layers(model).values()
    ]
    restore_bn(twin)
    assert all(type(m) is type(n) for m, n in zip(twin.modules(), backbone(name).modules(), strict=True))
    assert {switches_of(layer).train_stats for layer in find_bn_layers(model).values()} == {"stochastic"}


@pytest.mark.parametrize("cls", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_a_class_built_frozen_can_learn_and_go_back(cls):
    model, twin = toy(cls), toy(nn.BatchNorm2d if cls is FrozenBatchNorm2d else BatchNormAct2d)
    keys, x = list(model.state_dict()), images(size=12)
    frozen_output, layer, memory = model.eval()(x), model[4], model[4].weight.data_ptr()

    unfreeze_bn(model)
    assert switches_of(layer) == ("batch", "ema", "trained", "running")
    assert torch.equal(model.eval()(x), frozen_output) or torch.allclose(model(x), frozen_output, atol=1e-6)
    assert sorted(model.state_dict()) == sorted(keys)
    for each in (model.train(), twin.train()):
        each(x).square().sum().backward()
        torch.optim.SGD(each.parameters(), lr=1e-3).step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])

    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restore_bn(model)
    assert (type(layer), list(layer.parameters()), layer.weight.data_ptr()) == (cls, [], memory)
    assert not hasattr(layer, "momentum")
    assert not hasattr(layer, "num_batches_tracked")
    assert sorted(model.state_dict()) == sorted(keys)
    assert all(tensor.equal(trained[name]) for name, tensor in model.state_dict().items())


def test_frozen_classes_follow_freezing_as_they_are():
    model = toy(FrozenBatchNormAct2d)
    output = model.eval()(images(size=12))
    freeze_bn(model)
    assert switches_of(model[4]) == NATIVE[FrozenBatchNormAct2d]
    torch.testing.assert_close(model.eval()(images(size=12)), output)


def test_a_layer_without_running_statistics_is_named_when_it_would_need_them():
    model = toy(lambda channels: nn.BatchNorm2d(channels, track_running_stats=False))
    for policy in ({"train_stats": "running"}, {"eval_stats": "mix"}, {"update_stats": "ema"}, {"domains": "photo"}):
        with pytest.raises(LayerError, match=r"BN layer '4' keeps no running statistics"):
            apply_policy(model, BNPolicy(**policy))
    assert type(model[1]) is nn.BatchNorm2d  # the first layer has not been touched either
    apply_policy(model, BNPolicy(train_stats="ghost", ghost_size=2))
    model(images(size=12))


def test_an_unknown_class_is_refused_by_name_and_can_be_excluded():
    class Foreign(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).abs()

    model = toy(Foreign)
    with pytest.raises(LayerError, match=r"BN layer '4' is a .*Foreign, whose own forward is unknown"):
        freeze_bn(model)
    assert [type(layer) for layer in find_bn_layers(model).values()] == [nn.BatchNorm2d, Foreign]
    apply_policy(model, BNPolicy(train_stats="running", exclude="4"))


class HalvedBN(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_registered_class_keeps_its_tail_under_every_policy():
    register_bn_class(HalvedBN, tail=lambda layer, x: x / 2)
    model, x = toy(HalvedBN), images(size=12)
    trained, evaluated = copy.deepcopy(model).train()(x), copy.deepcopy(model).eval()(x)
    apply_policy(model, BNPolicy(train_stats="batch"))
    assert copy.deepcopy(model).train()(x).equal(trained)
    assert freeze_bn(model).train()(x).equal(evaluated)
    assert pickle.loads(pickle.dumps(model)).eval()(x).equal(evaluated)
    assert type(restore_bn(model)[4]) is HalvedBN


def test_a_shared_layer_is_one_layer_under_a_policy():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    twin = copy.deepcopy(model)
    apply_policy(model, BNPolicy(train_stats="batch"))
    x = images(size=8)
    assert model(x).equal(twin(x))
    assert norm.num_batches_tracked == 2
    assert type(restore_bn(model)[2]) is nn.BatchNorm2d


def test_nothing_to_train_is_an_error_only_when_asked_for():
    model = toy(lambda channels: nn.BatchNorm2d(channels, affine=False))
    freeze_bn(model)
    unfreeze_bn(model)
    with pytest.raises(LayerError, match="BN layer '4' has no weight and no bias to train"):
        apply_policy(model, BNPolicy(affine="trained"))


def test_1d_and_3d_layers_and_a_model_that_is_one():
    for layer, x in ((nn.BatchNorm1d(5), torch.randn(7, 5)), (nn.BatchNorm3d(5), torch.randn(3, 5, 2, 3, 2))):
        randomise(layer)
        twin = copy.deepcopy(layer)
        assert freeze_bn(layer) is layer
        assert layer.train()(x).equal(twin.eval()(x))
        assert isinstance(layer, type(twin))
        assert type(restore_bn(layer)) is type(twin)


def test_the_input_is_still_checked_as_the_class_does():
    layer = freeze_bn(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(2, 3))


def test_half_and_double_conversions_carry_everything_along():
    model = apply_policy(toy(), BNPolicy(domains="other", train_stats="renorm", renorm_ramp=3)).double()
    assert {buffer.dtype for buffer in model.buffers()} == {torch.double, torch.long}
    model(images(size=12).double())


NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
POLICIES = {
    "frozen": {"train_stats": "running", "update_stats": "none", "affine": "frozen"},
    "running": {"train_stats": "running"},
    "batch": {"train_stats": "batch"},
    "cumulative": {"update_stats": "cumulative", "eval_stats": "batch"},
    "sync": {"train_stats": "sync"},
    "ghost": {"train_stats": "ghost", "ghost_size": 2},
    "renorm": {"train_stats": "renorm", "renorm_warmup": 1, "renorm_ramp": 2},
    "stochastic": {"train_stats": "stochastic", "eval_stats": "mix"},
    "domains": {"domains": "b", "domain_affine": "own"},
}


def in_domain(model, policy):
    return domain(model, "b") if policy == "domains" else nullcontext()


def assert_alike(model, twin, policy):
    """Two models compute the same in training and in evaluation, and hold the same statistics afterwards."""
    for training in (True, False):
        outputs = []
        for each in (model.train(training), twin.train(training)):
            torch.manual_seed(0)
            with in_domain(each, policy):
                outputs.append(each(images(size=12)))
        assert outputs[0].equal(outputs[1])
    assert all(a.equal(b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@NORMS
@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_is_called_by_the_name_that_its_class_gives_its_input(norm, policy):
    layer = apply_policy(randomise(norm(6)), BNPolicy(**POLICIES[policy]))
    x, name = images(size=6).repeat(1, 2, 1, 1), "input" if norm is nn.BatchNorm2d else "x"
    other = "x" if name == "input" else "input"
    for training in (True, False):
        twin = copy.deepcopy(layer.train(training))
        for context in (no_stat_updates, lambda each: in_domain(each, policy), lambda each: in_domain(each, "")):
            results = []
            for each, args, kwargs in ((layer, (), {name: x}), (twin, (x,), {})):
                torch.manual_seed(0)
                with context(each):
                    results.append(each(*args, **kwargs))
            assert results[0].equal(results[1])
        for args, kwargs in (((), {other: x}), ((x,), {other: x}), ((), {name: x, other: x})):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{other}'"):
                layer(*args, **kwargs)
        for args, kwargs in (((), {}), ((x, x), {}), ((x,), {name: x})):
            with pytest.raises(TypeError, match=f"takes one input, '{name}'"):
                layer(*args, **kwargs)


def test_a_class_of_ones_own_is_called_by_its_own_name():
    class Named(nn.BatchNorm2d):
        def forward(self, activations):
            return super().forward(activations)

    register_bn_class(Named)
    layer, x = freeze_bn(randomise(Named(3))), images(size=6)
    assert layer(activations=x).equal(layer(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'input'; the input is named 'activations'"):
        layer(input=x)


@NORMS
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("filled", ["to_empty", "assign"])
def test_a_model_without_values_is_put_under_a_policy_before_it_gets_them(norm, policy, filled):
    with torch.device("meta"):
        model = toy(norm)
    twin = apply_policy(toy(norm), BNPolicy(**POLICIES[policy]))
    apply_policy(model, BNPolicy(**POLICIES[policy]))
    with in_domain(model, policy):
        assert model(images(size=12).to("meta")).is_meta
        assert model.eval()(images(size=12).to("meta")).is_meta
    restore_bn(model)
    apply_policy(model, BNPolicy(**POLICIES[policy]))
    if filled == "to_empty":
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(77)  # whatever stood in that memory
    model.load_state_dict(toy(norm).state_dict(), assign=filled == "assign")
    assert_alike(model, twin, policy)


@NORMS
@pytest.mark.parametrize("policy", POLICIES)
def test_the_default_device_does_not_matter(norm, policy):
    model, twin = toy(norm), apply_policy(toy(norm), BNPolicy(**POLICIES[policy]))
    with torch.device("meta"):
        apply_policy(model, BNPolicy(**POLICIES[policy]))
        load_policy_state(model, policy_state(model))
        with frozen(model), no_stat_updates(model):
            pass
    assert_alike(model, twin, policy)
    torch.set_default_device("meta")
    try:
        x = torch.ones(4, 3, 12, 12, device="cpu").normal_()
        with in_domain(model, policy):
            model.train()(x).sum().backward()
            model.eval()(x)
        assert type(restore_bn(model)[4]) is norm
    finally:
        torch.set_default_device(None)


@NORMS
@pytest.mark.parametrize("policy", POLICIES)
def test_a_reset_forgets_only_what_training_would_learn_again(norm, policy):
    model = apply_policy(toy(norm), BNPolicy(**POLICIES[policy]))
    before = tensors_of(model)
    with no_stat_updates(model):
        model[4].reset_running_stats()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    with in_domain(model, policy):
        model[4].reset_running_stats()
    prefix = "bn_b_" if policy == "domains" else ""
    mean, var = (getattr(model[4], f"{prefix}running_{each}") for each in ("mean", "var"))
    if policy == "frozen":
        assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    else:
        assert (mean.abs().sum(), var.unique().tolist()) == (0, [1.0])
    if policy == "domains":
        assert model[4].running_mean.equal(before["4.running_mean"])


@pytest.mark.parametrize("cls", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_layers_that_add_nothing_to_the_variance_can_learn_too(cls):
    """As those of torchvision's detectors with their own weights; PyTorch refuses an eps of 0 in training."""
    model, x = toy(cls).double().eval(), images(size=12).double()
    layers = {name: layer for name, layer in find_bn_layers(model).items() if type(layer) is cls}
    for layer in layers.values():
        layer.eps = 0.0
    frozen_output, first, inputs = model(x), next(iter(layers)), []
    layers[first].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))

    torch.testing.assert_close(unfreeze_bn(model)(x), frozen_output, rtol=1e-12, atol=1e-12)
    before = layers[first].running_mean.clone()
    model.train()(x).square().sum().backward()
    seen = inputs[-1].detach()
    torch.testing.assert_close(layers[first].running_mean, 0.9 * before + 0.1 * seen.mean((0, 2, 3)))
    assert all(layer.weight.grad.isfinite().all() for layer in layers.values())
    precise_bn(model, [x])
    torch.testing.assert_close(layers[first].running_var, seen.var((0, 2, 3), correction=0))
    restore_bn(model)
    assert [(type(layer), layer.eps) for layer in layers.values()] == [(cls, 0.0)] * len(layers)
