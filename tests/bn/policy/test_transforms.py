"""Rules under transforms of PyTorch: second derivatives, forward mode, torch.func, torch.fx, half precision.

The oracle of every rule is its formula in plain float64 operators (tests/bn/oracles.py); where plain BN itself refuses,
such as an update of statistics under `vmap`, the rules are tried without.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

from bnfinetune.bn import BNPolicy, apply_policy, freeze_bn
from bnfinetune.errors import LayerError
from tests.bn import oracles
from tests.bn.distributed import run_ranks
from tests.bn.models import backbone, differing, images, tensors_of, toy
from tests.bn.policy.test_rules import CHANNELS, DOUBLE, expected, make_input, make_layer

NORMS = (nn.BatchNorm2d, BatchNormAct2d)
TRAIN = {
    "batch": {},
    "running": {},
    "ghost": {"ghost_size": 3},
    "renorm": {"renorm_rmax": 1.4, "renorm_dmax": 0.3},
    "stochastic": {"stochastic_p": 0.5},
    "sync": {},
}
CASES = [*(("train_stats", rule) for rule in TRAIN), *(("eval_stats", rule) for rule in ("running", "batch", "mix"))]
SHAPE = (7, CHANNELS, 2, 3)


def layer_of(norm, switch: str, rule: str, **policy) -> nn.Module:
    extra = TRAIN[rule] if switch == "train_stats" else {"mix_prior": 6.0} if rule == "mix" else {}
    return make_layer(norm, **{switch: rule}, **extra, **policy).train(switch == "train_stats")


def formula(switch: str, rule: str, layer: nn.Module, x: torch.Tensor, weight, bias) -> torch.Tensor:
    """The rule's oracle, and timm's activation where the layer has one."""
    tensors = (weight, bias, layer.running_mean.clone(), layer.running_var.clone())
    if rule == "mix":
        y = oracles.mix(x, *tensors, eps=layer.eps, prior=6.0)
    elif switch == "eval_stats" or rule == "sync":
        y = getattr(oracles, "batch" if rule == "sync" else rule)(x, *tensors, eps=layer.eps, momentum=0.1).output
    else:
        held = nn.Module()
        held.weight, held.bias, held.eps, held.momentum = weight, bias, layer.eps, layer.momentum
        held.running_mean, held.running_var = tensors[2:]
        y = expected(rule, held, x).output
    return y.relu() if isinstance(layer, BatchNormAct2d) else y


def called(layer: nn.Module, x: torch.Tensor, weight, bias) -> torch.Tensor:
    torch.manual_seed(7)
    return functional_call(layer, {"weight": weight, "bias": bias}, (x,))


def weighted(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).square().sum()


@pytest.mark.parametrize("affine", ["trained", "frozen"])
@pytest.mark.parametrize(("switch", "rule"), CASES)
@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives(norm, switch, rule, affine):
    layer, results = layer_of(norm, switch, rule, affine=affine), []
    for function in (partial(formula, switch, rule), called):  # the second updates
        tensors = (
            make_input(SHAPE),
            *(p.detach().clone().requires_grad_(affine == "trained") for p in layer.parameters()),
        )
        inputs = [tensor for tensor in tensors if tensor.requires_grad]
        first = torch.autograd.grad(weighted(function(layer, *tensors)), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([g.detach() for g in (*first, *second)])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("switch", "rule"), CASES)
@pytest.mark.parametrize("norm", NORMS)
def test_transforms_of_torch_func(norm, switch, rule):
    layer = layer_of(norm, switch, rule, **({"update_stats": "none"} if switch == "train_stats" else {}))
    tensors = make_input(SHAPE).detach(), *(p.detach() for p in layer.parameters())

    def rule_of(*inputs):
        return called(layer, *inputs)

    def plain(*inputs):
        return formula(switch, rule, layer, *inputs)

    every = (0, 1, 2)
    torch.testing.assert_close(jacrev(rule_of, every)(*tensors), jacrev(plain, every)(*tensors), **DOUBLE)
    forward = jacfwd(rule_of, every, randomness="same")(*tensors)
    torch.testing.assert_close(forward, jacfwd(plain, every, randomness="same")(*tensors), **DOUBLE)
    stacked = torch.stack([tensors[0], tensors[0].flip(0) * 2])
    one_by_one = [grad(lambda *t: weighted(plain(*t)), every)(x, *tensors[1:]) for x in stacked]
    together = vmap(grad(lambda *t: weighted(rule_of(*t)), every), (0, None, None), randomness="same")
    for got, wanted in zip(together(stacked, *tensors[1:]), zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(wanted), **DOUBLE)


@pytest.mark.parametrize(("switch", "rule"), CASES)
@pytest.mark.parametrize("norm", NORMS)
def test_forward_mode_with_updates(norm, switch, rule):
    layer, twin = layer_of(norm, switch, rule), layer_of(norm, switch, rule)
    x, tangent = make_input(SHAPE).detach(), make_input(SHAPE, seed=5).detach()
    with forward_ad.dual_level():
        wanted = forward_ad.unpack_dual(
            formula(switch, rule, layer, forward_ad.make_dual(x, tangent), *layer.parameters())
        )
        torch.manual_seed(7)
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.requires_grad_(), tangent)))
        assert forward_ad.unpack_dual(layer.running_mean).tangent is None
    torch.testing.assert_close(got.tangent, wanted.tangent, **DOUBLE)
    torch.manual_seed(7)
    twin(x.detach())
    torch.testing.assert_close(tensors_of(layer), tensors_of(twin))


def pooled_rank(rank: int) -> list[torch.Tensor]:
    layer = make_layer(nn.BatchNorm2d, train_stats="sync", update_stats="none")
    x = make_input(SHAPE).detach().split([4, 3])[rank].requires_grad_()
    y = layer(x)
    w = torch.linspace(-1, 2, 7 * y[0].numel(), dtype=y.dtype).view(SHAPE).split([4, 3])[rank]
    (first,) = torch.autograd.grad((y * w).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return [first.detach(), second]


def test_second_derivatives_over_ranks(tmp_path):
    layer, x = make_layer(nn.BatchNorm2d, train_stats="sync", update_stats="none"), make_input(SHAPE)
    y = formula("train_stats", "sync", layer, x, layer.weight, layer.bias)
    (first,) = torch.autograd.grad(weighted(y), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    found = run_ranks(2, pooled_rank, tmp_path)
    for wanted, parts in zip((first, second), zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("policy", [{}, {"update_stats": "cumulative"}, {"affine": "frozen", "update_stats": "none"}])
@pytest.mark.parametrize(("switch", "rule"), CASES)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(BatchNormAct2d, act_layer=nn.SiLU)])  # no jump at zero
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_wholly_in_half_precision(dtype, norm, switch, rule, policy):
    half = layer_of(norm, switch, rule, **(policy if switch == "train_stats" else {})).to(dtype)
    wide = layer_of(norm, switch, rule, **(policy if switch == "train_stats" else {}))
    wide.load_state_dict({key: value.double() for key, value in half.state_dict().items()})
    x, results = make_input((8, CHANNELS, 4, 4)).detach().to(dtype), []
    for layer in (half, wide):
        leaf = x.to(layer.weight.dtype, copy=True).requires_grad_()
        torch.manual_seed(7)
        y = layer(leaf)
        assert y.dtype == leaf.dtype == layer.running_var.dtype
        (y * torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)).sum().backward()
        found = [y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
        results.append([tensor.double() for tensor in found if tensor is not None])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).norm() <= 8 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
@pytest.mark.parametrize("policy", ["frozen", "running", "batch", "eval batch", "eval running"])
def test_fx_traces_what_native_layers_allow(name, policy):
    policies = {
        "frozen": lambda model: freeze_bn(model),
        "running": lambda model: apply_policy(model, BNPolicy(train_stats="running", update_stats="none")),
        "batch": lambda model: apply_policy(model, BNPolicy(train_stats="batch")),
        "eval batch": lambda model: apply_policy(model, BNPolicy(eval_stats="batch")),
        "eval running": lambda model: apply_policy(model, BNPolicy(train_stats="ghost")),
    }
    model, twin = (policies[policy](backbone(name)).train("eval" not in policy) for _ in range(2))
    for each in (model, twin):
        for module in each.modules():
            if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob"):
                module.eval()
    traced, x = torch.fx.symbolic_trace(model), images()
    torch.manual_seed(0)
    got = traced(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, twin(x))
    moved = [key for key in differing(tensors_of(model), tensors_of(twin)) if "num_batches" not in key]
    assert not moved
    got.square().sum().backward()
    twin(x).square().sum().backward()
    for (key, mine), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (wanted.grad is None), key


@pytest.mark.parametrize("policy", [
    {"train_stats": "ghost"}, {"train_stats": "renorm"}, {"train_stats": "stochastic"}, {"train_stats": "running"},
    {"update_stats": "cumulative"}, {"eval_stats": "mix"},
])  # fmt: skip
def test_fx_refuses_by_name_what_it_would_get_wrong(policy):
    model = apply_policy(toy(BatchNormAct2d), BNPolicy(**policy)).train("eval_stats" not in policy)
    before = tensors_of(model)
    with pytest.raises(
        LayerError, match=r"BN layer '4' cannot be traced by torch.fx under (train|update|eval)_stats='"
    ):
        torch.fx.symbolic_trace(model)
    assert not differing(before, tensors_of(model))
