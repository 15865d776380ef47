"""Whatever fails, wherever: the model is bit for bit what it was."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, find_bn_layers
from bnfinetune.bn.statistics.fvcore import update_bn_stats
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.errors import StatisticsError
from tests.bn.models import backbone, images, toy

BATCHES = 20  # more than the recorders keep before they hand over
FAULTS = (RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3), GeneratorExit())


def fingerprint(model: nn.Module) -> bytes:
    """Everything that a pass could leave behind: bytes of all tensors, modes, momentum, hooks, attributes."""
    parts = []
    for name, module in model.named_modules():
        tensors = {key: t if t is None else (id(t), t.detach().numpy().tobytes()) for key, t in module._buffers.items()}
        hooks = [len(vars(module)[key]) for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        own = sorted(key for key in vars(module))
        parts.append(
            (name, tensors, module.training, getattr(module, "momentum", None), hooks, own, type(module).__qualname__)
        )
        parts.append({key: p if p is None else p.detach().numpy().tobytes() for key, p in module._parameters.items()})
    return pickle.dumps(parts)


def failing_loader(at: int, fault: BaseException) -> Iterator[torch.Tensor]:
    for index in range(BATCHES):
        if index == at:
            raise fault
        yield images(3, 8, index)
    if at == BATCHES:
        raise fault


def recompute(model: nn.Module, data: Iterator[torch.Tensor], drop_in: bool) -> None:
    if drop_in:
        update_bn_stats(model, data, BATCHES + 1)
    else:
        precise_bn(model, data)


def assert_unchanged_by(model: nn.Module, run: Callable[[], object], fault: BaseException) -> None:
    before = fingerprint(model)
    with pytest.raises(type(fault)) as caught:
        run()
    assert caught.value is fault
    assert fingerprint(model) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("drop_in", [False, True])
def test_a_fault_of_the_loader_at_any_batch(drop_in):
    model = toy(BatchNormAct2d).train(drop_in)
    for at in range(BATCHES + 1):
        fault = FAULTS[at % len(FAULTS)]
        assert_unchanged_by(
            model, lambda at=at, fault=fault: recompute(model, failing_loader(at, fault), drop_in), fault
        )


@pytest.mark.parametrize("drop_in", [False, True])
@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_fault_in_any_hook_at_any_call(register, drop_in):
    model = toy(BatchNormAct2d).train(drop_in)
    for module in list(model.modules()):
        for at in (0, 1, BATCHES - 1):
            calls, fault = [], FAULTS[at % 2]

            def hook(*_, at=at, calls=calls, fault=fault):
                calls.append(1)
                if len(calls) > at:
                    raise fault

            handle = getattr(module, register)(hook)
            data = [images(3, 8, index) for index in range(BATCHES)]
            assert_unchanged_by(model, lambda data=data: recompute(model, iter(data), drop_in), fault)
            handle.remove()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_a_nan_is_named_and_changes_nothing(name):
    model = backbone(name)
    data = [images(2), images(2)]
    data[1][0, 0, 0, 0] = float("nan")
    before = fingerprint(model)
    first = next(iter(find_bn_layers(model)))
    with pytest.raises(StatisticsError, match=f"BN layer '{first}' saw a batch with NaN or infinite"):
        precise_bn(model, data)
    assert fingerprint(model) == before


def test_statistics_too_large_for_the_buffers_change_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3)).half()
    before = fingerprint(model)
    with pytest.raises(StatisticsError, match="variance that is not finite in torch.float16"):
        precise_bn(model, [images(4, 8) * 1000], forward=lambda net, batch: net(batch))
    assert fingerprint(model) == before


class Counting(nn.Module):
    """Changes its state in every forward, in evaluation too, and once replaces its buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.replaced = self.replaced + 1
        return x


def test_the_state_of_other_layers_is_put_back_too():
    model = nn.Sequential(Counting(), nn.BatchNorm2d(3))
    fault = RuntimeError("broken")
    assert_unchanged_by(model, lambda: precise_bn(model, failing_loader(5, fault)), fault)


def test_policies_survive_a_fault():
    model = toy(BatchNormAct2d)
    apply_policy(model, BNPolicy(train_stats="renorm", eval_stats="mix", layers="4"))
    fault = KeyboardInterrupt()
    assert_unchanged_by(model, lambda: precise_bn(model, failing_loader(5, fault), layers="1"), fault)


def test_an_interrupt_while_the_statistics_are_worked_out(monkeypatch):
    model, fault = toy(), KeyboardInterrupt()

    def interrupted(*_, **__):
        raise fault

    monkeypatch.setattr("bnfinetune.bn.statistics.precise.write", interrupted)
    assert_unchanged_by(model, lambda: precise_bn(model, [images()]), fault)
