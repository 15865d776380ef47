"""A policy written to disk and read again goes on exactly where it was."""

import io
import json

import pytest
import torch

from bnfinetune.bn import (
    BNPolicy,
    apply_policy,
    describe_bn,
    domain,
    find_bn_layers,
    freeze_bn,
    load_policy_state,
    policy_state,
    restore_bn,
    unfreeze_bn,
)
from bnfinetune.errors import PolicyError, SelectionError
from tests.bn.models import BACKBONES, backbone, images, toy


def through_disk(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(model, steps) -> list[torch.Tensor]:
    outputs = []
    for step in steps:
        torch.manual_seed(step)
        outputs.append(model.train()(images(seed=step)))
        with domain(model, "b"):
            outputs.append(model(images(seed=step + 50)))
    return [*outputs, model.eval()(images())]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_resumed_model_goes_on_bit_for_bit(name):
    model = apply_policy(
        backbone(name),
        [
            BNPolicy(train_stats="renorm", renorm_warmup=1, renorm_ramp=4, domains="b", domain_affine="own"),
            BNPolicy(train_stats="stochastic", update_stats="cumulative", eval_stats="mix", layers="*bn2"),
        ],
    )
    freeze_bn(model, layers="*.0.*bn1")
    run(model, range(2))
    weights, policies = through_disk(model.state_dict()), through_disk(policy_state(model))
    resumed = backbone(name)
    load_policy_state(resumed, policies)
    resumed.load_state_dict(weights, strict=True)
    assert describe_bn(resumed.train()) == describe_bn(model.train())
    assert all(a.equal(b) for a, b in zip(run(model, range(2, 4)), run(resumed, range(2, 4)), strict=True))
    for each in (model, resumed):
        unfreeze_bn(each)
    assert describe_bn(resumed) == describe_bn(model)
    restore_bn(resumed)
    assert [type(m) for m in resumed.modules()] == [type(m) for m in backbone(name).modules()]


def test_loading_undoes_policies_that_the_state_has_not():
    state = policy_state(freeze_bn(toy(), layers="1"))
    model = apply_policy(freeze_bn(toy(), layers="4"), BNPolicy(domains="b", train_stats="renorm", renorm_ramp=2))
    load_policy_state(model, state)
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in toy().named_buffers()]
    assert describe_bn(model) == describe_bn(freeze_bn(toy(), layers="1"))


def test_the_plain_part_survives_json():
    model = apply_policy(toy(), BNPolicy(train_stats="ghost", ghost_size=3))
    freeze_bn(model)
    state = policy_state(model)
    for entry in state["layers"].values():
        assert entry.pop("tensors") == {}
    state = json.loads(json.dumps(state))
    for entry in state["layers"].values():
        entry["tensors"] = {}
    resumed = toy()
    load_policy_state(resumed, state)
    assert describe_bn(unfreeze_bn(resumed)) == describe_bn(unfreeze_bn(model))


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    model = toy()
    with pytest.raises(SelectionError, match="'bn1', no BN layer of this model"):
        load_policy_state(model, policy_state(freeze_bn(backbone("resnet18"))))
    with pytest.raises(PolicyError, match="no policy state of version 2"):
        load_policy_state(model, {"version": 7, "layers": {}})
    with pytest.raises(PolicyError, match="no policy state"):
        load_policy_state(model, model.state_dict())
    assert describe_bn(model) == describe_bn(toy())


def test_a_lost_process_group_is_said_when_it_is_needed(monkeypatch):
    group = object()
    model = apply_policy(toy(), BNPolicy(train_stats="sync", process_group=group))
    state = through_disk(policy_state(model))
    resumed = toy()
    load_policy_state(resumed, state)
    with pytest.raises(PolicyError, match="lost its process group"):
        resumed(images(size=12))
    kept = apply_policy(toy(), BNPolicy(train_stats="sync", process_group=group))
    load_policy_state(kept, state)
    assert all(layer._bn_state.options.ranks.process_group is group for layer in find_bn_layers(kept).values())
