"""The promises of every policy, on the smallest model of every timm family that has BN.

A few families run by default, all of them with `-m "slow or not slow"`; how many ran is printed at the end.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, find_bn_layers, freeze_bn, restore_bn, unfreeze_bn
from bnfinetune.bn.layers import is_bn_layer
from bnfinetune.bn.policy.switched_layer import switches_of
from tests.bn.families import FAMILIES, WITHOUT_BN, Family, each_family
from tests.bn.models import differing, randomise, tensors_of

POLICIES = {
    "batch": {"train_stats": "batch"},
    "running": {"train_stats": "running"},
    "sync": {"train_stats": "sync"},
    "ghost": {"train_stats": "ghost", "ghost_size": 2},
    "renorm": {"train_stats": "renorm"},
    "stochastic": {"train_stats": "stochastic"},
    "ema": {"update_stats": "ema", "momentum": 0.3},
    "cumulative": {"update_stats": "cumulative"},
    "no_update": {"update_stats": "none"},
    "trained": {"affine": "trained"},
    "frozen": {"affine": "frozen"},
    "eval_running": {"eval_stats": "running"},
    "eval_batch": {"eval_stats": "batch"},
    "eval_mix": {"eval_stats": "mix"},
    "frozen_bn": {"train_stats": "running", "update_stats": "none", "affine": "frozen"},
    "tent": {"train_stats": "batch", "update_stats": "none", "eval_stats": "batch", "affine": "trained"},
    "bn_only": {"train_stats": "running", "update_stats": "none", "affine": "trained"},
    "domains": {"domains": ("photo", "sketch"), "domain_affine": "own"},
}
# Where the batch gives the same output as in the plain model, in training mode.
SAME_IN_TRAINING = {"batch", "sync", "ema", "cumulative", "no_update", "trained", "frozen", "tent", "domains"} | {
    name for name in POLICIES if name.startswith("eval_")
}
NEED_AFFINE = {
    name for name, kind in POLICIES.items() if kind.get("affine") == "trained" or kind.get("domain_affine") == "own"
}
OTHER_IN_EVALUATION = {"eval_batch", "eval_mix", "tent"}


class Shared(nn.Module):
    """One BN layer in two places, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.again = self.bn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.conv(self.bn(x)).relu())


TOYS = {
    "1d": lambda: (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (7, 5)),
    "1d sequence": lambda: (nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.GELU()), (4, 2, 9)),
    "3d": lambda: (nn.Sequential(nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), nn.ReLU()), (4, 2, 4, 5, 6)),
    "fused": lambda: (nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6), nn.Conv2d(6, 3, 1)), (4, 3, 8, 8)),
    "root is BN": lambda: (nn.BatchNorm2d(3), (5, 3, 4, 4)),
    "root is fused BN": lambda: (BatchNormAct2d(3), (5, 3, 4, 4)),
    "nested": lambda: (nn.Sequential(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.ReLU())), (4, 3, 6, 6)),
    "shared": lambda: (Shared(), (4, 3, 6, 6)),
    "no affine": lambda: (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)), (4, 3, 8, 8)),
    "no momentum": lambda: (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None)), (4, 3, 8, 8)),
}


def build(family: Family) -> tuple[nn.Module, tuple[int, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(family.model, num_classes=3, **family.kwargs)
    return model, (family.batch, 3, family.size, family.size)


class Subject:
    """A model, what it computes by itself, and how it was before any policy."""

    def __init__(self, built: Callable[[], tuple[nn.Module, tuple[int, ...]]]) -> None:
        torch.manual_seed(0)
        model, shape = built()
        self.model = randomise(model)
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self.parameters = list(self.model.parameters())
        self.state = tensors_of(self.model)
        self.shape = self.structure()
        self.trained, self.after_training = self.run(train=True)
        self.evaluated, _ = self.run(train=False)

    def run(self, *, train: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The output for the batch and the state afterwards; the state is then put back, which is strict loading."""
        self.model.train(train)
        torch.manual_seed(2)
        with torch.no_grad():
            output = self.model(self.x)
        output = output[0] if isinstance(output, tuple) else output
        after = tensors_of(self.model)
        self.model.load_state_dict(self.state, strict=True)
        return output, after

    def structure(self) -> list[tuple]:
        return [
            (type(m), getattr(m, "momentum", None), getattr(m, "eps", None), [p.requires_grad for p in m.parameters()])
            for m in self.model.modules()
        ]


def check_policy(subject: Subject, name: str) -> None:
    model = subject.model
    apply_policy(model, BNPolicy(**POLICIES[name]))
    own = [p for n, p in model.named_parameters() if n.rpartition(".")[2].startswith("bn_")]
    assert own if name == "domains" else not own
    kept = [p for p in model.parameters() if not any(p is each for each in own)]
    assert all(a is b for a, b in zip(kept, subject.parameters, strict=True)), "a Parameter was replaced"
    assert differing(tensors_of(model), subject.state) == [], "the state_dict has changed"

    evaluated, after = subject.run(train=False)
    assert differing(after, subject.state) == [], "evaluation changed the state"
    if name not in OTHER_IN_EVALUATION:
        assert evaluated.equal(subject.evaluated), "evaluation has changed"
    trained, after = subject.run(train=True)
    assert trained.isfinite().all()
    if name in SAME_IN_TRAINING:
        assert trained.equal(subject.trained), "training computes something else"
    if name in {"batch", "sync", "domains", "trained", "frozen"}:
        assert differing(after, subject.after_training) == []
    assert bool(differing(after, subject.state)) == (POLICIES[name].get("update_stats") != "none")

    restore_bn(model)
    assert subject.structure() == subject.shape, "restore_bn left something behind"


def check_freezing(subject: Subject) -> None:
    model = freeze_bn(subject.model)
    layers = set(find_bn_layers(model).values())
    model.train()
    for module in model.modules():
        if module not in layers:
            module.training = False
    torch.manual_seed(2)
    with torch.no_grad():
        output = model(subject.x)
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(output, subject.evaluated)
    assert {switches_of(layer)[:3] for layer in layers} == {("running", "none", "frozen")}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            again = copied.eval()(subject.x)
        assert (again[0] if isinstance(again, tuple) else again).equal(subject.evaluated)
    restore_bn(unfreeze_bn(model))
    assert subject.structure() == subject.shape


def check(built: Callable[[], tuple[nn.Module, tuple[int, ...]]]) -> None:
    subject = Subject(built)
    has_affine = any(layer.weight is not None for layer in find_bn_layers(subject.model).values())
    for name in POLICIES:
        if name in NEED_AFFINE and not has_affine:
            continue
        try:
            check_policy(subject, name)
        except Exception as error:
            error.add_note(f"under {name}")
            raise
    check_freezing(subject)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", each_family())
def test_every_policy_keeps_its_promises(module):
    check(partial(build, FAMILIES[module]))


@pytest.mark.parametrize("toy", TOYS)
def test_every_policy_keeps_its_promises_on_toys(toy):
    check(TOYS[toy])


@pytest.mark.slow
def test_no_timm_family_is_left_out():
    assert not FAMILIES.keys() & WITHOUT_BN
    ours = {"backbone"}  # the module of the embedded network, registered once anything has imported it
    assert FAMILIES.keys() | WITHOUT_BN == set(timm.list_modules()) - ours
    for module, family in FAMILIES.items():
        assert family.model in timm.list_models(module=module)
    for module in WITHOUT_BN:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(timm.list_models(module=module)[0])
        assert not any(map(is_bn_layer, model.modules())), module
