"""Forwards that hide in a training step: recomputation, second passes, skipped steps."""

import copy
import math

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from bnfinetune.bn import (
    BNPolicy,
    StatSnapshot,
    apply_policy,
    domain,
    find_bn_layers,
    freeze_bn,
    no_stat_updates,
    restore_bn,
)
from bnfinetune.errors import LayerError, SelectionError, StatisticsError
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of, toy

POLICIES = {
    "batch": {"train_stats": "batch"},
    "cumulative": {"update_stats": "cumulative"},
    "running": {"train_stats": "running"},
    "frozen": {"train_stats": "running", "update_stats": "none", "affine": "frozen"},
    "frozen_stats": {"train_stats": "running", "update_stats": "none"},
    "sync": {"train_stats": "sync"},
    "ghost": {"train_stats": "ghost", "ghost_size": 2},
    "renorm": {"train_stats": "renorm", "renorm_rmax": 1.5, "renorm_warmup": 1, "renorm_ramp": 2},
    "stochastic": {"train_stats": "stochastic"},
}


class Checkpointed(nn.Module):
    """Recomputes its blocks in backward."""

    def __init__(self, blocks: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.use_reentrant = blocks, use_reentrant

    def forward(self, x):
        for half in (self.blocks[:3], self.blocks[3:]):
            x = checkpoint(half, x, use_reentrant=self.use_reentrant)
        return x


def three_steps(model: nn.Module, parameters) -> torch.Tensor:
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    for step in range(3):
        torch.manual_seed(step)
        loss = model(images(size=12, seed=step).requires_grad_()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_checkpointing_changes_nothing(policy, use_reentrant):
    plain = apply_policy(toy(), BNPolicy(**POLICIES[policy]))
    blocks = copy.deepcopy(plain)
    losses = three_steps(plain, plain.parameters())
    assert losses.equal(three_steps(Checkpointed(blocks, use_reentrant), blocks.parameters()))
    assert differing(tensors_of(plain), tensors_of(blocks)) == []
    assert plain[1].num_batches_tracked == (3 if "none" not in POLICIES[policy].values() else 0)


@pytest.mark.parametrize("name", BACKBONES)
def test_timm_checkpointing_updates_once(name):
    plain = apply_policy(backbone(name), BNPolicy(train_stats="batch"))
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        for step in range(3):
            torch.manual_seed(step)
            model(images(seed=step)).square().mean().backward()
    assert differing(tensors_of(plain), tensors_of(saving)) == []
    assert {int(layer.num_batches_tracked) for layer in find_bn_layers(saving).values()} == {3}


def test_recomputation_keeps_to_the_domain_of_its_forward():
    gradients = []
    for use_checkpoint in (False, True):
        model = apply_policy(toy(), BNPolicy(train_stats="running", domains="b", domain_affine="own"))
        with torch.no_grad():
            for layer in find_bn_layers(model).values():
                layer.get_buffer("bn_b_running_mean").add_(1)
                layer.get_parameter("bn_b_weight").mul_(2)
        net = Checkpointed(model, use_reentrant=False) if use_checkpoint else model
        with domain(model, "b"):
            loss = net(images(size=12)).square().mean()
        loss.backward()
        gradients.append(model[0].weight.grad)
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_held_updates_normalise_the_same_and_store_nothing(policy):
    model = toy() if policy is None else apply_policy(toy(), BNPolicy(**POLICIES[policy]))
    types, before = [type(module) for module in model.modules()], tensors_of(model)
    torch.manual_seed(0)
    wanted = copy.deepcopy(model)(images(size=12))
    with no_stat_updates(model):
        with no_stat_updates(model):
            torch.manual_seed(0)
            assert model(images(size=12)).equal(wanted)
        model(images(size=12))
    assert differing(before, tensors_of(model)) == []
    assert [type(module) for module in model.modules()] == types
    model(images(size=12))
    moved = bool(differing(before, tensors_of(model)))
    assert moved == (policy is None or "none" not in POLICIES[policy].values())


def test_a_backward_after_the_context_recomputes_what_was_held():
    plain, saving = (apply_policy(toy(), BNPolicy(train_stats="renorm")) for _ in range(2))
    before = tensors_of(saving)
    gradients = []
    for model, net in ((plain, plain), (saving, Checkpointed(saving, use_reentrant=False))):
        with no_stat_updates(model):
            loss = net(images(size=12)).square().mean()
        loss.backward()
        gradients.append(model[0].weight.grad)
    assert gradients[0].equal(gradients[1])
    assert differing(before, tensors_of(saving)) == []


def test_a_policy_given_within_the_context_outlives_it():
    model = toy()
    with no_stat_updates(model):
        freeze_bn(model, layers="1")
    assert [type(layer).__name__ for layer in find_bn_layers(model).values()] == ["SwitchedBatchNorm2d", "BatchNorm2d"]
    with no_stat_updates(model):
        restore_bn(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1].momentum == 0.1


def test_an_error_within_the_context_lets_go_too():
    model = toy()
    with pytest.raises(RuntimeError), no_stat_updates(model):
        model(torch.zeros(1))
    assert type(model[1]) is nn.BatchNorm2d
    with pytest.raises(SelectionError, match="no BatchNorm layer"), no_stat_updates(nn.Linear(1, 1)):
        pass


def test_an_unknown_class_cannot_be_held():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    model = toy(Odd)
    with pytest.raises(LayerError, match="BN layer '4'"), no_stat_updates(model):
        pass
    assert type(model[1]) is nn.BatchNorm2d


def test_a_second_sam_pass_leaves_the_statistics_of_the_first():
    model, twin = toy(), toy()
    for step in range(2):
        twin(images(size=12, seed=step)).sum().backward()
        model(images(size=12, seed=step)).sum().backward()
        with no_stat_updates(model):
            model(images(size=12, seed=step) + 5).sum().backward()
    assert differing(tensors_of(model), tensors_of(twin)) == []


def test_a_skipped_step_is_taken_back_bit_for_bit():
    model = apply_policy(toy(), BNPolicy(domains="b", train_stats="renorm", renorm_ramp=5))
    snapshot = StatSnapshot(model)
    with pytest.raises(StatisticsError, match=r"call take\(\) before"):
        snapshot.rollback()
    for step in range(3):
        snapshot.take()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(images(size=12, seed=step))
        with domain(model, "b"):
            model(images(size=12, seed=step + 10))
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert any(not after[name].equal(before[name]) for name in after)
        snapshot.rollback()
        assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())
        model(images(size=12, seed=step))
    restore_bn(model)
    snapshot.take()
    model(images(size=12))
    snapshot.rollback()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("change", ["before take", "after take", "moved", "another layer", "loaded"])
def test_a_snapshot_follows_buffers_that_are_replaced(change, norm):
    model = toy(norm)
    snapshot = StatSnapshot(model)
    snapshot.take()
    model(images(size=12))

    def replace() -> None:
        if change == "moved":
            model.double()
        elif change == "another layer":
            model[4] = copy.deepcopy(model[4])
        elif change == "loaded":
            model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
        else:
            model[4].running_var = model[4].running_var.clone()

    if change == "before take":
        replace()
    snapshot.take()
    before = tensors_of(model)
    if change != "before take":
        replace()
    model(images(size=12, seed=1).to(model[0].weight.dtype))
    assert not model[4].running_var.float().equal(before["4.running_var"])
    snapshot.rollback()
    assert all(tensor.float().equal(before[key].float()) for key, tensor in model.state_dict().items())


def test_a_snapshot_leaves_alone_what_is_no_statistic():
    model = toy()
    prune.l1_unstructured(model[4], "weight", 0.5)
    snapshot = StatSnapshot(model)
    snapshot.take()
    prune.l1_unstructured(model[4], "weight", 0.5)
    pruned = model[4].weight_mask.clone()
    snapshot.rollback()
    assert model[4].weight_mask.equal(pruned)
    for buffer in (model[4].running_mean, model[4].running_var):
        buffer.add_(1)
    model[4].running_mean = None  # taken off since: nothing to write it to
    snapshot.rollback()
    assert model[4].running_mean is None


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_batch_leaves_a_model_that_evaluates(name, poison):
    model = apply_policy(backbone(name), BNPolicy(train_stats="batch"))
    wanted = backbone(name).eval()(images())
    x = images()
    x[0] = poison
    model(x)
    assert model.eval()(images()).equal(wanted)
