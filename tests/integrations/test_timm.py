"""BN in timm's tasks and script: one call before the optimizer is all that they need."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.utils.model import unwrap_model

import bnfinetune as bnf
from tests.bn.models import differing, images, randomise, tensors_of

task_module = pytest.importorskip("timm.task")


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=3))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_policy_holds_in_timms_task_with_its_average_and_checkpoint(name, compiled):
    model = bnf.freeze_bn(network(name))
    before = tensors_of(model)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    task = task_module.ClassificationTask(model, verbose=False)
    task.setup_ema(decay=0.5)
    if compiled:
        task.compile(backend="eager")
    for step in range(4):
        task.get_trainable_module().train()
        task.train()
        optimizer.zero_grad()
        task(images(seed=step), torch.arange(4) % 3)["loss"].backward()
        optimizer.step()
        task.update_ema()
    held = {f"{layer}." for layer in bnf.find_bn_layers(model)}
    for ema in (False, True):
        key = "state_dict_ema" if ema else "state_dict"
        saved = {k: v.clone() for k, v in task.get_checkpoint_state(ema=ema)[key].items()}
        moved = differing(before, saved)
        assert moved
        assert not [k for k in moved if any(k.startswith(layer) for layer in held)]
        plain = network(name)
        plain.load_state_dict(saved)
        evaluated = unwrap_model(task.get_eval_model(ema=ema)).eval()
        with torch.no_grad():
            torch.testing.assert_close(plain.eval()(images()), evaluated(images()))


def test_without_it_timms_task_moves_the_statistics_of_frozen_layers():
    model = network("test_resnet")
    for layer in bnf.find_bn_layers(model).values():
        layer.requires_grad_(False).eval()
    before = tensors_of(model)
    task = task_module.ClassificationTask(model, verbose=False)
    task.get_trainable_module().train()
    task(images(), torch.arange(4) % 3)
    assert any("running_mean" in key for key in differing(before, tensors_of(model)))


def test_population_statistics_for_the_average_before_it_is_evaluated():
    model = network("test_efficientnet")
    task = task_module.ClassificationTask(model, verbose=False)
    average = task.setup_ema(decay=0.5)
    bnf.precise_bn(task.get_eval_model(ema=True), [images(16)])
    other = copy.deepcopy(network("test_efficientnet"))
    bnf.precise_bn(other, [images(16)])
    assert not differing(tensors_of(average.module), tensors_of(other))
    assert not differing(tensors_of(model), tensors_of(network("test_efficientnet")))
