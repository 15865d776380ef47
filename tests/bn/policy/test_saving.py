"""A policy written to disk and read again goes on exactly where it was."""

import copy
import io
import json

import pytest
import torch
from timm.layers import BatchNormAct2d

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
from bnfinetune.errors import LayerError, PolicyError, SelectionError
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


def everything(model) -> dict:
    """All that loading a policy state could change, by layer."""
    return {
        name: (
            type(layer),
            layer.momentum,
            getattr(layer, "_bn_state", None),
            {key: (id(p), p.requires_grad, p.detach().clone().tolist()) for key, p in layer.named_parameters()},
            {key: (id(b), b.clone().tolist()) for key, b in layer.named_buffers()},
            sorted(vars(layer)),
        )
        for name, layer in find_bn_layers(model).items()
    }


def set_in(state: dict, *path_and_value) -> None:
    *path, key, value = path_and_value
    for part in path:
        state = state[part]
    state[key] = value


DAMAGES = {
    "no mapping": lambda layers: set_in(layers, "4", None),
    "a missing key": lambda layers: layers["4"].pop("eval_stats"),
    "a key too many": lambda layers: set_in(layers, "4", "extra", 1),
    "an unknown rule": lambda layers: set_in(layers, "4", "train_stats", "__class__"),
    "no rule": lambda layers: set_in(layers, "4", "eval_stats", None),
    "updates that are no truth value": lambda layers: set_in(layers, "4", "updates", "no"),
    "half of what was before": lambda layers: set_in(layers, "4", "stats_before", ("batch",)),
    "a momentum that is not finite": lambda layers: set_in(layers, "4", "momentum", float("nan")),
    "a momentum in words": lambda layers: set_in(layers, "4", "momentum", "0.1"),
    "another momentum before": lambda layers: set_in(layers, "4", "ema_momentum", None),
    "options missing": lambda layers: layers["4"]["options"].pop("mix_prior"),
    "an option of no size": lambda layers: set_in(layers, "4", "options", "ghost_size", 0),
    "an option of another type": lambda layers: set_in(layers, "4", "options", "renorm_ramp", 2.5),
    "a domain that is no name": lambda layers: set_in(layers, "4", "options", "domains", ("a b",)),
    "domains in one word": lambda layers: set_in(layers, "4", "options", "domains", "ab"),
    "a group of no rank": lambda layers: set_in(layers, "4", "options", "ranks", {"size": 0, "given": False}),
    "learning by other names": lambda layers: set_in(layers, "4", "learning", {"gamma": {"gamma": True}}),
    "learning in words": lambda layers: set_in(layers, "4", "learning", "weight", {"weight": "yes"}),
    "a buffer for a Parameter": lambda layers: set_in(layers, "4", "learning", "weight", {}),
    "a missing tensor": lambda layers: layers["4"]["tensors"].pop("bn_b_running_var"),
    "a tensor too many": lambda layers: set_in(layers, "4", "tensors", "bn_c_running_mean", torch.zeros(6)),
    "a tensor of another shape": lambda layers: set_in(layers, "4", "tensors", "bn_b_running_mean", torch.zeros(1)),
    "no tensor": lambda layers: set_in(layers, "4", "tensors", "bn_b_running_mean", [0.0] * 6),
    "a tensor without values": lambda layers: set_in(
        layers, "4", "tensors", "bn_b_running_mean", torch.zeros(6, device="meta")
    ),
}


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_changes_nothing(damage, norm):
    source = apply_policy(toy(norm), BNPolicy(train_stats="renorm", renorm_ramp=2, domains="b", domain_affine="own"))
    freeze_bn(source, layers="4")
    state = copy.deepcopy(policy_state(source))
    DAMAGES[damage](state["layers"])
    model = apply_policy(toy(norm), BNPolicy(train_stats="ghost", domains="a", layers="4"))
    before = everything(model)
    with pytest.raises(
        PolicyError, match=r"the policy state of BN layer '4' is damaged or of another model: .*save it"
    ):
        load_policy_state(model, state)
    assert everything(model) == before


@pytest.mark.parametrize(
    "hostile", [None, [], "state", {"version": 2}, {"version": 2, "layers": ["1"]}, {"version": 1}]
)
def test_what_is_no_state_changes_nothing(hostile):
    model = freeze_bn(toy())
    before = everything(model)
    with pytest.raises(PolicyError, match="no policy state of version 2"):
        load_policy_state(model, hostile)
    assert everything(model) == before


def test_a_refusal_at_the_layers_that_would_be_restored_changes_nothing():
    state = policy_state(freeze_bn(toy(), layers="1"))
    model = freeze_bn(toy(), layers="4")
    model[4].forward = lambda x: x
    before = everything(model)
    with pytest.raises(LayerError, match="the forward of BN layer '4' was replaced"):
        load_policy_state(model, state)
    assert everything(model) == before


def test_a_state_that_needs_statistics_is_refused_by_a_layer_without():
    state = policy_state(freeze_bn(toy()))
    model = toy(lambda channels: torch.nn.BatchNorm2d(channels, track_running_stats=False))
    with pytest.raises(LayerError, match="BN layer '4' keeps no running statistics"):
        load_policy_state(model, state)
    assert type(model[1]) is torch.nn.BatchNorm2d


def test_values_are_not_lost_on_the_meta_device():
    state = policy_state(apply_policy(toy(), BNPolicy(domains="b")))
    with pytest.raises(PolicyError, match="on the meta device, where values would be lost"):
        load_policy_state(toy().to("meta"), state)
