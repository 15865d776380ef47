"""Domains: each population has its statistics, and one of them can be taken out as a plain model."""

import copy

import pytest
import torch
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, domain, export_domain, find_bn_layers, freeze_bn, restore_bn
from bnfinetune.errors import PolicyError, SelectionError
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of, toy


@pytest.mark.parametrize("name", BACKBONES)
def test_each_domain_has_the_statistics_of_its_own_batches(name):
    model, alone = backbone(name), {None: backbone(name), "photo": backbone(name), "sketch": backbone(name)}
    apply_policy(model, BNPolicy(domains=("photo", "sketch")))
    for step in range(3):
        for number, each in enumerate(alone):
            torch.manual_seed(step)
            with domain(model, each):
                model(images(seed=step) + number)
            torch.manual_seed(step)
            alone[each](images(seed=step) + number)
    assert differing(tensors_of(model), tensors_of(alone[None])) == []
    model.eval()
    for each in alone:
        with domain(model, each):
            assert model(images()).equal(alone[each].eval()(images()))


@pytest.mark.parametrize("name", BACKBONES)
def test_an_exported_domain_is_a_plain_timm_model(name):
    model = apply_policy(backbone(name), BNPolicy(domains="sketch", domain_affine="own"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with domain(model, "sketch"):
        model(images() + 2).square().mean().backward()
    optimizer.step()
    state = tensors_of(model)
    plain = export_domain(model, "sketch")
    assert [type(module) for module in plain.modules()] == [type(module) for module in backbone(name).modules()]
    assert list(plain.state_dict()) == list(backbone(name).state_dict())
    with domain(model.eval(), "sketch"):
        wanted = model(images())
    assert plain.eval()(images()).equal(wanted)
    assert not model(images()).equal(wanted)
    assert differing(tensors_of(model), state) == []


def test_own_affine_learns_apart_and_stays_out_of_the_state_dict():
    model = toy()
    keys = list(model.state_dict())
    apply_policy(model, BNPolicy(domains="b", domain_affine="own"))
    assert list(model.state_dict()) == keys
    names = [name for name, _ in model.named_parameters()]
    assert "1.bn_b_weight" in names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared, own = model[1].weight.clone(), model[1].bn_b_weight.clone()
    with domain(model, "b"):
        model(images(size=12)).square().mean().backward()
    optimizer.step()
    assert model[1].weight.equal(shared)
    assert not model[1].bn_b_weight.equal(own)
    model.load_state_dict(toy().state_dict(), strict=True)
    freeze_bn(model)
    assert not model[1].bn_b_weight.requires_grad
    restore_bn(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in toy().named_parameters()]


def test_a_domain_that_was_never_declared_is_an_error():
    model = toy()
    with pytest.raises(SelectionError, match=r"no domain 'target'; declared are none; add it by BNPolicy\(domains="):
        domain(model, "target").__enter__()
    assert type(model[1]) is nn.BatchNorm2d
    apply_policy(model, BNPolicy(domains="target"))
    with domain(model, "target"):
        model(images(size=12))
    assert model[1].num_batches_tracked == 0
    assert model[1].bn_target_num_batches_tracked == 1
    with pytest.raises(SelectionError, match="no domain 'taget'; declared are target; add it by BNPolicy"):
        domain(model, "taget").__enter__()
    with pytest.raises(PolicyError, match="'my domain' is no identifier"):
        BNPolicy(domains="my domain")
    with pytest.raises(SelectionError, match="no domain 'x' in this model"):
        export_domain(model, "x")


def test_contexts_nest_and_end_with_errors():
    model = apply_policy(toy(), BNPolicy(domains=("a", "b")))
    with domain(model, "a"):
        with pytest.raises(RuntimeError), domain(model, "b"):
            model(torch.zeros(1))
        with domain(model, None):
            model(images(size=12))
        model(images(size=12))
    layer = model[1]
    counts = (layer.num_batches_tracked, layer.bn_a_num_batches_tracked, layer.bn_b_num_batches_tracked)
    assert [int(count) for count in counts] == [1, 1, 0]


def test_domains_of_some_layers_leave_the_others_shared():
    model = apply_policy(toy(), BNPolicy(domains="b", layers="4"))
    with domain(model, "b"):
        model(images(size=12))
    assert (model[1].num_batches_tracked, model[4].num_batches_tracked) == (1, 0)
    plain = export_domain(model, "b")
    assert (plain[1].num_batches_tracked, plain[4].num_batches_tracked) == (1, 1)


@pytest.mark.parametrize("train_stats", ["running", "renorm", "stochastic", "ghost"])
def test_every_rule_reads_and_updates_the_domain(train_stats):
    model, alone = toy(), toy()
    needed = {"ghost_size": 2} if train_stats == "ghost" else {}
    for each in (model, alone):
        apply_policy(each, BNPolicy(train_stats=train_stats, **needed))
    apply_policy(model, BNPolicy(domains="b"))
    for step in range(2):
        torch.manual_seed(step)
        with domain(model, "b"):
            got = model(images(size=12, seed=step))
        torch.manual_seed(step)
        assert got.equal(alone(images(size=12, seed=step)))
    assert model[4].bn_b_running_var.equal(alone[4].running_var)
    assert model[4].running_var.equal(toy()[4].running_var)


def test_a_copy_made_within_a_domain_is_outside_of_it():
    model = apply_policy(toy(), BNPolicy(domains="b"))
    with domain(model, "b"):
        twin = copy.deepcopy(model)
        twin(images(size=12))
    assert twin[1].num_batches_tracked == 1
    assert isinstance(twin, nn.Sequential)
    assert len(find_bn_layers(twin)) == 2
