"""What makes the host wait for an accelerator: reading a value back, and copies between devices.

The meta device stands in for an accelerator. A value read from it (`item`, `bool`, `nonzero`) is an error there, and
a dispatch mode sees every operator, so that copies between it and the CPU are counted; where a copy to the CPU must go
on, the mode hands out ones.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnfinetune.bn import BNPolicy, apply_policy, find_bn_layers
from bnfinetune.bn.statistics.fvcore import update_bn_stats
from bnfinetune.bn.statistics.precise import precise_bn
from tests.bn.distributed import run_ranks

NORMS = (nn.BatchNorm2d, BatchNormAct2d)
RULES = {
    "batch": {},
    "running": {},
    "ghost": {"ghost_size": 3},
    "renorm": {"renorm_warmup": 1, "renorm_ramp": 2},
    "stochastic": {},
    "sync": {},
}


class Copies(TorchDispatchMode):
    """Counts operators that take tensors of one device and give, or write to, tensors of another."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = [t for t in inputs if t.device.type == "meta"]
        target = (kwargs or {}).get("device")
        if func is torch.ops.aten._local_scalar_dense.default and on_device:
            self.seen["value read"] += 1
        if func is torch.ops.aten._to_copy.default and on_device and str(target) == "cpu":
            self.seen["to host"] += 1
            return torch.ones(inputs[0].shape, dtype=(kwargs or {}).get("dtype") or inputs[0].dtype, device="cpu")
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" and t.ndim for t in inputs) and any(
            t.device.type == "meta" for t in (*outputs, *on_device)
        ):
            self.seen["to device"] += 1
        return result


def chain(layers: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), norm(3)) for _ in range(layers)))


def waits_of_training(layers: int, norm: type[nn.Module], half: bool = False, **policy) -> dict[str, int]:
    model = apply_policy(chain(layers, norm), BNPolicy(**policy)).to("meta")
    model = model.to(torch.bfloat16) if half else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    x = torch.empty(7, 3, 8, 8, device="meta", dtype=torch.bfloat16 if half else torch.float32)
    with Copies() as copies:
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return dict(copies.seen)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("update", ["ema", "cumulative", "none"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", NORMS)
def test_no_rule_waits_in_a_training_step(norm, rule, update, half):
    assert waits_of_training(3, norm, half, train_stats=rule, update_stats=update, **RULES[rule]) == {}


@pytest.mark.parametrize("rule", ["running", "batch", "mix"])
@pytest.mark.parametrize("norm", NORMS)
def test_no_rule_waits_in_evaluation(norm, rule):
    model = apply_policy(chain(3, norm), BNPolicy(eval_stats=rule)).to("meta").eval()
    with Copies() as copies, torch.no_grad():
        model(torch.empty(7, 3, 8, 8, device="meta"))
    assert not copies.seen


def pooling_rank(rank: int) -> list[str]:
    """Pools moments as on an accelerator, up to the collective; names the operators that took host data."""
    from bnfinetune.bn import functional

    operators: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.append(func.name())
            return func(*args, **(kwargs or {}))

    with Names():
        functional.pooled_moments(torch.ones(3), torch.ones(3), 5, torch.distributed.group.WORLD)
    return operators


def test_pooling_over_ranks_takes_no_data_from_the_host(tmp_path):
    for operators in run_ranks(2, pooling_rank, tmp_path):
        assert not {"aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero"} & set(operators)
        assert any("all" in name and "gather" in name for name in operators)


MEASURES = {
    "precise_bn": lambda model, data: precise_bn(model, data),
    "precise_bn ema": lambda model, data: precise_bn(model, data, variance="ema"),
    "precise_bn tolerance": lambda model, data: precise_bn(model, data, tolerance=1e-9),
    "update_bn_stats": lambda model, data: update_bn_stats(model.train(), data, len(data)),
}


def waits_of_a_pass(measure: str, layers: int, batches: int, norm: type[nn.Module]) -> Counter[str]:
    model = chain(layers, norm).to("meta")
    data = [torch.empty(4, 3, 8, 8, device="meta")] * batches
    with Copies() as copies:
        MEASURES[measure](model, data)
    return copies.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("norm", NORMS)
def test_a_pass_waits_as_often_for_many_layers_as_for_one(norm, measure, monkeypatch):
    for module in ("bnfinetune.bn.statistics.precise", "bnfinetune.bn.statistics.fvcore"):
        monkeypatch.setattr(f"{module}.require_values", lambda layers: None)  # which would refuse the meta device
    assert len(find_bn_layers(chain(9, norm))) == 9
    one, nine = (waits_of_a_pass(measure, layers, 20, norm) for layers in (1, 9))
    assert one == nine
    assert one["value read"] == 0
    assert one["to device"] <= 2  # means and variances of all layers, and counters
    blocks = 20 if "tolerance" in measure else 3  # the first batch, the first 16, the rest
    assert one["to host"] <= blocks + 4  # and what the layers held before: floats and counters
