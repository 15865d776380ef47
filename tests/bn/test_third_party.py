"""What other people's code does to a model, before or after a policy: one line per report.

A report does something to a model whose layers 1 and 4 are BN. It is done to a model under a policy and to an oracle
that computes in plain PyTorch what the policy says; outputs, gradients and statistics must agree, before and after
`restore_bn`. What a policy cannot stand is an error that names the layer: see `REFUSED`.
"""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, update_bn

from bnfinetune.bn import BNPolicy, apply_policy, domain, freeze_bn, no_stat_updates, restore_bn, unfreeze_bn
from bnfinetune.errors import LayerError
from tests.bn import oracles
from tests.bn.models import images, toy

NORMS = (nn.BatchNorm2d, BatchNormAct2d)
POLICIES: dict[str, dict[str, Any]] = {
    "frozen": {"train_stats": "running", "update_stats": "none", "affine": "frozen"},
    "frozen statistics": {"train_stats": "running", "update_stats": "none"},
    "batch": {"train_stats": "batch"},
    "cumulative": {"update_stats": "cumulative"},
}


class Fixed(nn.Module):
    """Frozen BN in plain operators, and no BN layer to anybody's code."""

    def __init__(self, layer: nn.Module, learns: bool) -> None:
        super().__init__()
        self.eps, self.act = layer.eps, getattr(layer, "act", nn.Identity())
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(getattr(layer, name).detach().clone(), requires_grad=learns))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name).clone())

    def forward(self, *args, **kwargs):
        (x,) = (*args, *kwargs.values())
        return self.act(oracles.normal(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps))


def under(policy: str, model: nn.Sequential) -> nn.Sequential:
    """The oracle of a policy."""
    for index in (1, 4):
        if "frozen" in policy:
            model[index] = Fixed(model[index], learns=policy != "frozen")
        elif policy == "cumulative":
            model[index].momentum = None
    return model


class Kept(nn.Module):
    """A model within another, which calls it in its own way."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def __getitem__(self, index: int) -> nn.Module:
        return self.inner[index]


class ByKeyword(Kept):
    def forward(self, x):
        for index, layer in enumerate(self.inner):
            x = layer(**{"x" if isinstance(layer, BatchNormAct2d) else "input": x}) if index != 2 else layer(x)
        return x


class Replicated(Kept):
    """Calls a replica, as `nn.DataParallel` makes them for each device: Parameters there are plain attributes."""

    def forward(self, x):
        modules = list(self.inner.modules())
        replicas = {module: module._replicate_for_data_parallel() for module in modules}
        for module, replica in replicas.items():
            for name, child in module._modules.items():
                setattr(replica, name, replicas[child])
            for name, parameter in module._parameters.items():
                setattr(replica, name, parameter.clone() if parameter.requires_grad else parameter.detach())
            for name, buffer in module._buffers.items():
                setattr(replica, name, buffer)
        return replicas[self.inner](x)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((6,), 1.5, dtype=torch.float64))

    def forward(self, weight):
        return weight * self.gain


def emptied(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


def hooked(model, removed=False):
    for layer in model:
        add_hook_to_module(layer, ModelHook())
        if removed:
            remove_hook_from_module(layer)


def averaged(model):
    average = AveragedModel(model)
    average.update_parameters(model)
    return average.module


def reset(model):
    for layer in model:
        getattr(layer, "reset_running_stats", lambda: None)()


def batches():
    return [images(size=12, seed=seed).double() for seed in (5, 6)]


class Report(NamedTuple):
    """What somebody's code does to a model; what it returns, if anything, takes the model's place.

    Attributes:
        does: called with the model.
        when: whether it is done before the policy, after it, or either.
        learns: whether gradients can be compared.
    """

    does: Callable[[Any], Any]
    when: str = "before after"
    learns: bool = True


def on(index: int, act: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Does something to one layer, in place."""
    return lambda model: act(model[index]) and None


def pruned(layer, name="weight", for_good=False):
    prune.l1_unstructured(layer, name, 0.5)
    if for_good:
        prune.remove(layer, name)


REPORTS = {
    "nothing": Report(lambda m: None),
    "pruned": Report(on(4, pruned)),
    "bias pruned": Report(on(1, lambda layer: pruned(layer, "bias"))),
    "pruned for good": Report(on(4, lambda layer: pruned(layer, for_good=True))),
    "weight_norm": Report(on(4, weight_norm)),
    "spectral_norm": Report(on(4, spectral_norm)),
    "parametrised weight_norm": Report(on(4, parametrizations.weight_norm)),
    "parametrised spectral_norm": Report(on(4, parametrizations.spectral_norm)),
    "learnt parametrisation": Report(on(4, lambda b: parametrize.register_parametrization(b, "bias", Gain()))),
    "tied weights": Report(lambda m: setattr(m[4], "weight", m[1].weight), "before"),
    "accelerate's hooks": Report(hooked),
    "accelerate's hooks, removed": Report(lambda m: hooked(m, removed=True)),
    "dispatch_model": Report(lambda m: dispatch_model(m, {"": "cpu"}, force_hooks=True) and None),
    "cpu_offload": Report(lambda m: cpu_offload(m, execution_device="cpu") and None, learns=False),
    "a forward kept": Report(on(4, lambda b: setattr(b, "forward", types.MethodType(type(b).forward, b)))),
    "hooks": Report(on(4, lambda b: b.register_forward_hook(lambda layer, args, out: 2 * out))),
    "pre-hooks": Report(on(4, lambda b: b.register_forward_pre_hook(lambda layer, args: (args[0] + 1,)))),
    "update_bn": Report(lambda m: update_bn(batches(), m), "after"),
    "reset_running_stats": Report(reset, "after"),
    "called by keyword": Report(ByKeyword),
    "replicated": Report(Replicated),
    "to meta and back": Report(emptied),
    "state assigned": Report(lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True) and None),
    "copied": Report(copy.deepcopy),
    "pickled": Report(lambda m: pickle.loads(pickle.dumps(m))),
    "averaged": Report(averaged),
    "sliced": Report(lambda m: m[:5]),
}


def cases() -> Iterator[Any]:
    for name, report in REPORTS.items():
        for when in report.when.split():
            yield pytest.param(report, when, id=f"{name}, {when}")


def met(model: Any, report: Report, when: str, policy: Callable[[Any], Any]) -> Any:
    """A model that a report and a policy have met."""
    steps = [policy, report.does] if when == "after" else [report.does, policy]
    for step in steps:
        model = step(model) or model
    return model


def outcome(model: nn.Module, report: Report) -> dict[str, Any]:
    """Outputs of a step in training and of evaluation, gradients, and the statistics afterwards."""
    model.zero_grad()
    x = images(size=12).double().requires_grad_(report.learns)
    with torch.set_grad_enabled(report.learns):
        out = model.train()(x)
    if report.learns:
        out.square().mean().backward()
    found = {"trained": out.detach(), "input": x.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name or "batches" in name}
    with torch.no_grad():
        found["evaluated"] = model.eval()(images(size=12, seed=2).double())
    return found


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("report", "when"), list(cases()))
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_policy_computes_what_it_says(report, when, norm, policy):
    model = met(toy(norm).double(), report, when, lambda m: apply_policy(m, BNPolicy(**POLICIES[policy])))
    oracle = met(toy(norm).double(), report, "after", lambda m: under(policy, m))
    if policy == "frozen":
        for index in (1, 4):
            oracle[index].requires_grad_(False)  # what weight and bias are computed from too
    assert_equal(outcome(model, report), outcome(oracle, report))

    native = met(toy(norm).double(), report, when, lambda m: None)
    native.load_state_dict(restore_bn(model).state_dict())
    assert_equal(outcome(model, report), outcome(native, report))
    assert [str(type(module)) for module in model.modules()] == [str(type(module)) for module in native.modules()]


def replace_forward(index: int) -> Callable[[Any], None]:
    def act(model):
        before = model[index].forward
        model[index].forward = lambda *args: before(*args)

    return act


def prune_own(model):
    prune.l1_unstructured(model[4], "bn_b_weight", 0.5)


def offloaded(model):
    cpu_offload(model, execution_device="cpu")


OWN = BNPolicy(domains="b", domain_affine="own")
GROWING = BNPolicy(train_stats="renorm", renorm_ramp=2)
REFUSED: dict[str, tuple[list[Callable[[Any], Any]], Callable[[Any], Any], str]] = {
    # what comes first, then the call that is refused, and what it says
    "forward replaced": ([replace_forward(4)], freeze_bn, "forward of BN layer '4' was replaced"),
    "forward replaced, updates held": ([replace_forward(4)], lambda m: no_stat_updates(m).__enter__(), "'4' was repl"),
    "forward replaced, then restored": ([freeze_bn, replace_forward(4)], restore_bn, "'4' was replaced"),
    "forward replaced, then thawed": ([freeze_bn, replace_forward(4)], unfreeze_bn, "'4' was replaced"),
    "own affine pruned": ([lambda m: apply_policy(m, OWN), prune_own], restore_bn, "'4' computes 'bn_b_weight'"),
    "own affine, offloaded": ([offloaded], lambda m: apply_policy(m, OWN), "'1' is offloaded by accelerate"),
    "age, offloaded": ([lambda m: apply_policy(m, GROWING), offloaded], restore_bn, "would miss 'bn_renorm_age'"),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("report", REFUSED)
def test_what_a_policy_cannot_stand_is_refused_before_anything_changes(report, norm):
    before, call, message = REFUSED[report]
    model = toy(norm)
    for step in before:
        step(model)
    types_before = [type(module) for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(LayerError, match=message):
        call(model)
    assert [type(module) for module in model.modules()] == types_before
    assert [parameter.requires_grad for parameter in model.parameters()] == learning


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("report", ["replicated", "called by keyword", "dispatch_model", "copied", "update_bn"])
def test_domains_stand_it_too(report, norm):
    model = apply_policy(toy(norm).double(), OWN)
    oracle = toy(norm).double()
    shared = {name: buffer.clone() for name, buffer in model.state_dict().items()}
    with domain(model, "b"):
        model, oracle = (REPORTS[report].does(each) or each for each in (model, oracle))
    with domain(model, "b"):
        found = outcome(model, REPORTS[report])
    wanted = outcome(oracle, REPORTS[report])
    for key in ("trained", "input", "evaluated"):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-10, atol=1e-12)
    for tensor in ("running_mean", "running_var", "weight", "bias"):
        own, expected = getattr(model[4], f"bn_b_{tensor}"), getattr(oracle[4], tensor)
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
        if own.requires_grad:
            torch.testing.assert_close(own.grad, expected.grad, rtol=1e-10, atol=1e-12)
    assert all(tensor.equal(shared[name]) for name, tensor in toy(norm).double().state_dict().items())
