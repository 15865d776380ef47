"""Policies: freezing that holds, exact undoing, composition, refusals that touch nothing."""

import copy
import random

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from bnfinetune.bn import (
    BNPolicy,
    apply_policy,
    auto_momentum,
    convert_sync_bn,
    describe_bn,
    find_bn_layers,
    freeze_bn,
    frozen,
    load_policy_state,
    no_stat_updates,
    policy_state,
    restore_bn,
    revert_sync_bn,
    unfreeze_bn,
)
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.errors import LayerError, PolicyError, SelectionError
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of, toy

STATS = ("running_mean", "running_var", "num_batches_tracked")
FROZEN = {"train_stats": "running", "update_stats": "none", "affine": "frozen"}
NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])


def attributes(model: nn.Module) -> dict[str, tuple]:
    """Everything that `restore_bn` promises, by module name."""
    return {
        name: (
            type(module),
            module.training,
            getattr(module, "momentum", None),
            getattr(module, "eps", None),
            tuple((key, id(p), p.requires_grad) for key, p in module._parameters.items() if p is not None),
            tuple((key, id(b)) for key, b in module._buffers.items()),
            tuple(sorted(key for key in vars(module) if key != "_non_persistent_buffers_set")),
        )
        for name, module in model.named_modules()
    }


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    model.train()(images(seed=seed)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", BACKBONES)
def test_freezing_holds_through_train_and_unfreezing_is_exact(name):
    model = backbone(name)
    before = attributes(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, weight_decay=0.1)
    train_step(model, optimizer)
    norms = {f"{layer}.{key}" for layer in find_bn_layers(model) for key in (*STATS, "weight", "bias")}

    freeze_bn(model)
    frozen = tensors_of(model)
    for step in range(2):
        train_step(model, optimizer, seed=step)
    changed = set(differing(frozen, tensors_of(model)))
    assert not changed & norms
    assert changed == set(dict(model.named_parameters())) - norms

    unfreeze_bn(model)
    train_step(model, optimizer)
    assert norms <= set(differing(frozen, tensors_of(model)))

    restore_bn(model)
    assert attributes(model) == before


@pytest.mark.parametrize("name", BACKBONES)
def test_a_frozen_model_trains_as_it_evaluates(name):
    model = backbone(name)
    wanted = model.eval()(images())
    freeze_bn(model).train()
    layers = find_bn_layers(model)
    for module in model.modules():
        if module not in layers.values():
            module.eval()  # dropout and the like have modes of their own
    torch.testing.assert_close(model(images()), wanted)


@pytest.mark.parametrize(("stats", "affine"), [(True, False), (False, True)])
def test_half_a_freeze_freezes_that_half(stats, affine):
    model = freeze_bn(toy(), stats=stats, affine=affine)
    before = tensors_of(model)
    train_step_toy(model)
    changed = {name.split(".")[-1] for name in differing(before, tensors_of(model)) if name[0] in "14"}
    assert changed == (set() if stats else set(STATS)) | (set() if affine else {"weight", "bias"})


def train_step_toy(model: nn.Module) -> None:
    model.train()(images(size=12)).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def test_an_optimizer_built_before_goes_on_with_the_right_tensors():
    model, twin = toy(), toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    apply_policy(model, BNPolicy(train_stats="renorm", affine="frozen"))
    restore_bn(model)
    for step in range(3):
        for each, its in ((model, optimizer), (twin, reference)):
            its.zero_grad()
            each(images(size=12, seed=step)).square().mean().backward()
            its.step()
    assert differing(tensors_of(model), tensors_of(twin)) == []


def test_a_leftover_gradient_does_not_move_a_frozen_weight():
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(images(size=12)).square().mean().backward()
    weight = model[1].weight.clone()
    freeze_bn(model)
    optimizer.step()
    assert model[1].weight.equal(weight)


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_policies_is_undone_exactly(seed):
    chance = random.Random(seed)
    model = backbone(BACKBONES[seed % 2])
    layers = list(find_bn_layers(model).values())
    layers[2].eval()
    layers[3].weight.requires_grad_(False)
    layers[4].momentum, layers[5].momentum, layers[5].eps = None, 0.37, 0.02
    before = attributes(model)
    choices = {
        "train_stats": ["batch", "running", "sync", "ghost", "renorm", "stochastic", None],
        "update_stats": ["ema", "cumulative", "none", None],
        "affine": ["trained", "frozen", None],
        "eval_stats": ["running", "batch", "mix", None],
        "layers": ["*", "*.bn1", "*.0.*"],
        "domains": [(), "photo", ("photo", "sketch")],
    }
    apply_policy(model, BNPolicy())
    for _ in range(6):
        step = chance.choice(["policy", "policy", "freeze", "unfreeze"])
        if step == "policy":
            settings = {key: chance.choice(values) for key, values in choices.items()}
            if settings["train_stats"] == "renorm":
                settings["renorm_ramp"] = chance.choice([None, 3])
            if settings["domains"]:
                settings["domain_affine"] = chance.choice([None, "own", "shared"])
            apply_policy(model, BNPolicy(**settings))
        else:
            {"freeze": freeze_bn, "unfreeze": unfreeze_bn}[step](model, stats=chance.random() < 0.8, affine=True)
    restore_bn(model)
    assert attributes(model) == before


def test_modes_stay_as_the_user_has_them():
    model = toy().train()
    model[4].eval()
    restore_bn(freeze_bn(model))
    assert [module.training for module in model] == [True, True, True, True, False]
    freeze_bn(model).train()
    model[1].eval()
    restore_bn(model)
    assert [module.training for module in model] == [True, False, True, True, True]
    restore_bn(freeze_bn(model.train()).eval())
    assert not any(module.training for module in model.modules())


def test_unfreezing_brings_back_the_switches_from_before():
    model = toy()
    model[4].bias.requires_grad_(False)
    apply_policy(model, BNPolicy(train_stats="ghost", update_stats="cumulative", eval_stats="mix"))
    before = [switches_of(layer) for layer in find_bn_layers(model).values()]
    freeze_bn(model)
    freeze_bn(model, affine=False)
    assert switches_of(model[1]) == ("running", "none", "frozen", "mix")
    unfreeze_bn(model)
    assert [switches_of(layer) for layer in find_bn_layers(model).values()] == before
    assert (model[4].weight.requires_grad, model[4].bias.requires_grad) == (True, False)


def test_policies_compose_and_later_ones_win():
    model = backbone("resnet18")
    apply_policy(
        model,
        [
            BNPolicy(train_stats="running", update_stats="none"),
            BNPolicy(train_stats="batch", layers=("layer4.*", "bn1")),
            BNPolicy(update_stats="cumulative", layers="layer4.1.*"),
        ],
    )
    found = {name: switches_of(layer)[:2] for name, layer in find_bn_layers(model).items()}
    assert found["layer1.0.bn1"] == ("running", "none")
    assert found["bn1"] == ("batch", "none")
    assert found["layer4.1.bn2"] == ("batch", "cumulative")
    apply_policy(model, BNPolicy(update_stats="ema"))
    assert switches_of(model.layer4[1].bn2)[:2] == ("batch", "ema")
    assert model.layer4[1].bn2.momentum == 0.1


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_travel_both_ways_between_policy_and_plain_timm(name):
    policy = BNPolicy(
        train_stats="renorm", renorm_ramp=4, domains=("a", "b"), domain_affine="own", eval_stats="running"
    )
    plain = backbone(name)
    model = apply_policy(copy.deepcopy(plain), policy)
    assert differing(tensors_of(plain), tensors_of(model)) == []
    model(images())
    assert plain.load_state_dict(model.state_dict(), strict=True) == ([], [])
    model.load_state_dict(backbone(name).state_dict(), strict=True)
    plain.eval(), model.eval()
    plain.load_state_dict(model.state_dict())
    assert plain(images()).equal(model(images()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_stats": "runing"}, r"train_stats='runing' is not one of batch, running, .*; did you mean 'running'\?"),
        ({"update_stats": "off"}, "update_stats='off' is not one of ema, cumulative, none"),
        ({"affine": True}, "affine=True is not one of trained, frozen"),
        ({"momentum": 1.5}, r"momentum=1.5 is out of bounds; choose from 0 to 1"),
        ({"momentum": float("nan")}, "momentum=nan is out of bounds"),
        ({"ghost_size": 0}, "ghost_size=0 is out of bounds"),
        ({"renorm_rmax": 0.5}, "renorm_rmax=0.5 is out of bounds"),
        ({"ghost_size": 2.5, "train_stats": "ghost"}, "ghost_size=2.5 is not a whole number; choose from 1"),
        ({"ghost_size": True}, "ghost_size=True is not a whole number"),
        ({"mix_prior": "16"}, "mix_prior='16' is not a number; choose from 0 to inf"),
        ({"update_stats": "cumulative", "momentum": 0.1}, "has no meaning with update_stats='cumulative'"),
        ({"update_stats": "none", "momentum": 0.1}, "momentum=0.1 has no meaning with update_stats='none'; leave it"),
        ({"train_stats": "batch", "ghost_size": 8}, "ghost_size=8 has no meaning with train_stats='batch'"),
        ({"train_stats": "ghost", "stochastic_p": 0.2}, "stochastic_p=0.2 has no meaning with train_stats='ghost'"),
        ({"train_stats": "batch", "renorm_ramp": 0}, "renorm_ramp=0 has no meaning with train_stats='batch'"),
        ({"train_stats": "batch", "sync_group_size": 2}, "sync_group_size=2 has no meaning with train_stats='batch'"),
        ({"eval_stats": "batch", "mix_prior": 4}, "mix_prior=4 has no meaning with eval_stats='batch'; leave it out"),
        ({"renorm_ramp": 5, "renorm_dmax": float("inf")}, "cannot ramp up to an infinite bound"),
        ({"process_group": object(), "sync_group_size": 2}, "contradict each other"),
        ({"domains": "two words"}, "'two words' is no identifier"),
    ],
)
def test_a_policy_that_makes_no_sense_says_why(wrong, message):
    with pytest.raises(PolicyError, match=message):
        BNPolicy(**wrong)


@pytest.mark.parametrize(
    ("setting", "switch"),
    [
        ({"ghost_size": 8}, {"train_stats": "ghost"}),
        ({"stochastic_p": 0.1}, {"train_stats": "stochastic"}),
        ({"renorm_rmax": 2.0}, {"train_stats": "renorm"}),
        ({"renorm_warmup": 0}, {"train_stats": "renorm"}),
        ({"mix_prior": 4.0}, {"eval_stats": "mix"}),
        ({"process_group": object()}, {"train_stats": "sync"}),
        ({"sync_group_size": 1}, {"train_stats": "sync"}),
        ({"momentum": 0.2}, {"update_stats": "ema"}),
        ({"domain_affine": "own"}, {"domains": "b"}),
    ],
)
def test_a_setting_that_no_switch_uses_is_refused(setting, switch):
    other = {"train_stats": "batch", "update_stats": "none", "eval_stats": "running"}
    model = apply_policy(toy(), BNPolicy(**other))
    before = attributes(model)
    with pytest.raises(PolicyError, match=rf"BN layer '1' .*{next(iter(setting))}"):
        apply_policy(model, BNPolicy(**setting))
    assert attributes(model) == before
    apply_policy(model, [BNPolicy(**setting), BNPolicy(**switch)])  # as one they make sense
    apply_policy(model, BNPolicy(**setting))  # and now the layers have the switch
    apply_policy(toy(), BNPolicy(**setting, **switch))
    with pytest.raises(PolicyError, match="BN layer '4'"):
        apply_policy(toy(), [BNPolicy(**other), BNPolicy(**switch, layers="1"), BNPolicy(**setting)])
    apply_policy(toy(), [BNPolicy(**other), BNPolicy(**switch, layers="1"), BNPolicy(**setting, layers="1")])


@NORMS
@pytest.mark.parametrize("policy", [None, {"train_stats": "ghost", "ghost_size": 2, "domains": "b"}, FROZEN])
def test_frozen_within_a_context_and_exactly_as_before_afterwards(norm, policy):
    model = toy(norm)
    model[1].weight.requires_grad_(False)
    if policy is not None:
        apply_policy(model, BNPolicy(**policy))
    model(images(size=12)).sum().backward()
    before = attributes(model), [p.grad for p in model.parameters()], describe_bn(model), policy_state(model)["layers"]
    tensors = tensors_of(model)
    with frozen(model) as inside:
        assert inside is model
        assert {row[2:5] for row in describe_bn(model)} == {("running", "none", "frozen")}
        model.train()(images(size=12)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert {name.split(".")[0] for name in differing(tensors, tensors_of(model))} == {"0", "3"}
        assert all(model[index].weight.grad is None for index in (1, 4))
    after = attributes(model), [p.grad for p in model.parameters()], describe_bn(model), policy_state(model)["layers"]
    assert str(after) == str(before)
    with pytest.raises(RuntimeError), frozen(model, stats=False, layers="4"):
        model(torch.zeros(1))
    assert describe_bn(model) == before[2]


@NORMS
def test_frozen_contexts_nest_and_outlive_changes_within(norm):
    model = apply_policy(toy(norm), BNPolicy(train_stats="renorm", layers="4"))
    before = attributes(model), describe_bn(model)
    with frozen(model, exclude="4"):
        assert [row.train_stats for row in describe_bn(model)] == ["running", "renorm"]
        with frozen(model, affine=False), no_stat_updates(model):
            assert [row.affine for row in describe_bn(model)] == ["frozen", "trained"]
        assert [row.train_stats for row in describe_bn(model)] == ["running", "renorm"]
        restore_bn(model)
    assert describe_bn(model)[0] == before[1][0]
    with frozen(model):
        apply_policy(model, BNPolicy(train_stats="ghost", eval_stats="mix", domains="b"))
    assert [type(layer) for layer in model] == [type(layer) for layer in toy(norm)]
    with no_stat_updates(model):
        with frozen(model):
            pass
        stats = tensors_of(model)
        model.train()(images(size=12))
        assert differing(stats, tensors_of(model)) == []
    assert [type(layer) for layer in model] == [type(layer) for layer in toy(norm)]
    with pytest.raises(PolicyError, match="would do nothing"), frozen(model, stats=False, affine=False):
        pass


def test_layers_can_be_excluded_everywhere():
    model = freeze_bn(toy(), exclude="4")
    assert [row.train_stats for row in describe_bn(model)] == ["running", "batch"]
    freeze_bn(model)
    unfreeze_bn(model, exclude="1")
    assert [row.train_stats for row in describe_bn(model)] == ["running", "batch"]
    model = convert_sync_bn(toy(), exclude=["1"])
    assert [row.train_stats for row in describe_bn(model)] == ["batch", "sync"]
    revert_sync_bn(convert_sync_bn(model), exclude="4")
    assert [row.train_stats for row in describe_bn(model)] == ["batch", "sync"]
    for change in (freeze_bn, unfreeze_bn, convert_sync_bn, revert_sync_bn):
        with pytest.raises(SelectionError, match="'nothing' matches no BN layer"):
            change(model, exclude="nothing")


@NORMS
def test_names_of_the_users_stay(norm):
    model = toy(norm)
    model[4].register_buffer("bn_mask", torch.ones(6))
    model[4].bn_scale = nn.Parameter(torch.ones(6))
    vars(model[4])["_bn_x"] = 7
    twin = copy.deepcopy(model)
    before, keys = attributes(model), list(model.state_dict())
    for policy in ({"domains": ("a", "b"), "domain_affine": "own"}, {"train_stats": "renorm", "renorm_ramp": 2}):
        apply_policy(model, BNPolicy(**policy))
        assert list(model.state_dict()) == keys
        assert twin.load_state_dict(model.state_dict()) == ([], [])
        assert "bn_mask" not in str(policy_state(model))
    with no_stat_updates(model):
        model(images(size=12))
    load_policy_state(model, policy_state(freeze_bn(toy(norm))))
    restore_bn(model)
    assert attributes(model) == before
    assert (model[4]._bn_x, model[4].bn_mask.tolist()) == (7, [1.0] * 6)


def test_a_name_that_is_taken_is_said_before_anything_changes():
    model = toy()
    model[4].register_buffer("bn_b_running_mean", torch.ones(6))
    with pytest.raises(LayerError, match="BN layer '4' has a 'bn_b_running_mean' already"):
        apply_policy(model, BNPolicy(domains="b"))
    vars(model[4])["_bn_holds"] = 3
    with pytest.raises(LayerError, match="BN layer '4' has an attribute '_bn_holds', which policies use"):
        freeze_bn(model)
    assert (type(model[1]), model[4]._bn_holds) == (nn.BatchNorm2d, 3)


@pytest.mark.parametrize("change", [freeze_bn, unfreeze_bn])
def test_doing_nothing_is_refused(change):
    with pytest.raises(PolicyError, match="would do nothing"):
        change(toy(), stats=False, affine=False)
    with pytest.raises(SelectionError, match=r"'layer9\*' matches no BN layer"):
        change(toy(), layers="layer9*")
    with pytest.raises(SelectionError, match="no BatchNorm layer in Linear"):
        change(nn.Linear(2, 2))


def test_a_refused_list_leaves_the_model_untouched():
    model = toy()
    before = attributes(model)
    with pytest.raises(SelectionError):
        apply_policy(model, [BNPolicy(train_stats="running"), BNPolicy(affine="frozen", layers="9")])
    with pytest.raises(PolicyError, match="empty list"):
        apply_policy(model, [])
    assert attributes(model) == before


def test_cumulative_updates_need_a_counter():
    model = toy()
    model[4].num_batches_tracked = None
    with pytest.raises(LayerError, match="BN layer '4' counts no batches"):
        apply_policy(model, BNPolicy(update_stats="cumulative"))
    apply_policy(model, BNPolicy(update_stats="ema"))
    model(images(size=12))


def test_momentum_is_applied_and_undone():
    model = apply_policy(toy(), BNPolicy(momentum=0.25))
    old = model[1].running_mean.clone()
    batch = model[0](images(size=12)).mean((0, 2, 3))
    model(images(size=12))
    torch.testing.assert_close(model[1].running_mean, 0.75 * old + 0.25 * batch)
    assert restore_bn(model)[1].momentum == 0.1


def test_torch_update_bn_still_works_on_a_layer_under_a_policy():
    model, twin = toy(), toy()
    apply_policy(model, BNPolicy(train_stats="ghost", ghost_size=2, affine="frozen"))
    apply_policy(model, BNPolicy(train_stats="batch"))
    for each in (model, twin):
        torch.optim.swa_utils.update_bn([images(size=12, seed=s) for s in range(3)], each)
    for name, tensor in tensors_of(model).items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.1), (100, 0.1), (1000, 0.01)])
def test_momentum_from_the_length_of_an_epoch(steps, momentum):
    assert auto_momentum(steps) == pytest.approx(momentum)
    with pytest.raises(PolicyError, match="steps_per_epoch=0"):
        auto_momentum(0)


def test_the_table_tells_every_layer_and_switch():
    model = toy()
    freeze_bn(model, layers="4")
    model[1].bias.requires_grad_(False)
    table = describe_bn(model.train())
    assert [row.name for row in table] == ["1", "4"]
    assert table[0][1:] == ("BatchNorm2d", "batch", "ema", "trained", "running", "yes/no", 0.1, 1e-5, "train")
    assert table[1][1:7] == ("BatchNorm2d", "running", "none", "frozen", "running", "no")
    lines = str(table).splitlines()
    assert lines[0].split()[:3] == ["name", "type", "train"]
    assert len(lines) == 3
    assert lines[2].split() == [
        "4",
        "BatchNorm2d",
        "running",
        "none",
        "frozen",
        "running",
        "no",
        "0.1",
        "1e-05",
        "train",
    ]
