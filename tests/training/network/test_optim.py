"""Parameter groups against an independent reading of the model, timm's optimizers and schedules."""

import math

import pytest
import timm
import torch
from torch import nn

from bnfinetune.errors import PolicyError, RecipeError
from bnfinetune.recipe import Optim, Schedule
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.network.optim import (
    build_optimizer,
    build_schedule,
    check_groups,
    match_formats,
    param_groups,
    with_rate,
)

PLAIN, LAST = torch.contiguous_format, torch.channels_last
FAMILIES = ["resnet18", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224"]


def tiny(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs)


def decays_by_name(groups) -> dict[str, float]:
    return {name: group["weight_decay"] for group in groups for name in group["param_names"]}


def norm_parameter_names(model: nn.Module) -> set[str]:
    """The oracle: parameters of modules that hold running statistics, or that normalise without them."""
    return {
        f"{prefix}.{local}"
        for prefix, module in model.named_modules()
        for local, _ in module.named_parameters(recurse=False)
        if hasattr(module, "running_mean") or "normalized_shape" in vars(module) or "num_groups" in vars(module)
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("norm_decay", "bias_decay"), [(False, False), (True, False), (False, True)])
def test_norms_and_biases_decay_only_on_request(name, norm_decay, bias_decay):
    model = tiny(name)
    decays = decays_by_name(param_groups(model, 0.1, norm_decay=norm_decay, bias_decay=bias_decay))
    norms = norm_parameter_names(model)
    assert norms
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    for parameter, _ in model.named_parameters():
        if parameter in exempt:
            expected = 0.0
        elif parameter in norms:
            expected = 0.1 * norm_decay
        elif parameter.endswith(".bias"):
            expected = 0.1 * bias_decay
        else:
            expected = 0.1
        assert decays[parameter] == expected, parameter


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_every_trainable_parameter_is_in_one_group_and_no_frozen_one(name):
    model = tiny(name)
    model.conv1.weight.requires_grad_(False) if name == "resnet18" else model.conv_stem.weight.requires_grad_(False)
    groups = param_groups(model, 0.1, lr=1.0, layer_decay=0.5)
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_name_that_only_sounds_like_a_norm_decays():
    model = nn.ModuleDict({"bn_norm": nn.Linear(2, 2), "weird": nn.BatchNorm1d(2)})
    decays = decays_by_name(param_groups(model, 0.1))
    assert decays == {"bn_norm.weight": 0.1, "bn_norm.bias": 0.0, "weird.weight": 0.0, "weird.bias": 0.0}


def test_a_shared_parameter_is_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    groups = param_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == 3


def test_layer_decay_falls_geometrically_towards_the_stem():
    model = tiny("resnet18")
    rates = {n: g["lr"] for g in param_groups(model, 0.1, lr=1.0, layer_decay=0.5) for n in g["param_names"]}
    assert rates["fc.weight"] == 1.0
    assert rates["conv1.weight"] == min(rates.values())
    assert all(math.log2(rate).is_integer() for rate in rates.values())
    assert rates["layer4.1.conv2.weight"] == 2 * rates["layer4.0.conv2.weight"]


def test_without_a_rate_groups_carry_timms_scale_and_with_one_the_head_multiplier():
    model = tiny("efficientnet_b0")
    assert all("lr" not in group and "lr_scale" in group for group in param_groups(model, 0.1))
    rates = {n: g["lr"] for g in param_groups(model, 0.1, lr=0.5, head_lr_scale=10) for n in g["param_names"]}
    assert rates["classifier.weight"] == 5.0
    assert rates["conv_stem.weight"] == 0.5


def test_check_names_the_parameter_that_is_missing_or_doubled():
    model = nn.Linear(2, 2)
    with pytest.raises(PolicyError, match=r"weight is in 2 optimizer groups"):
        check_groups(model, [{"params": [model.weight, model.weight, model.bias]}])
    with pytest.raises(PolicyError, match=r"bias is in 0 optimizer groups"):
        check_groups(model, [{"params": [model.weight]}])
    with pytest.raises(PolicyError, match="no parameter is trainable"):
        check_groups(model.requires_grad_(False), [])


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(RecipeError, match=r"no optimizer 'adamv'; did you mean adam"):
        build_optimizer(nn.Linear(2, 2), Optim(name="adamv"))
    with pytest.raises(RecipeError, match="optim.kwargs"):
        build_optimizer(nn.Linear(2, 2), Optim(kwargs={"no_such": 1}))


@pytest.mark.parametrize(
    ("optim", "fused"),
    [
        (Optim(name="adamw"), True),
        (Optim(name="sgd"), True),
        (Optim(name="lookahead_adam"), True),
        (Optim(name="adamw", kwargs={"foreach": True}), None),
        (Optim(name="lamb"), None),
    ],
)
def test_steps_are_one_kernel_where_torch_has_one(optim, fused):
    assert build_optimizer(nn.Linear(2, 2), optim).param_groups[0].get("fused") is fused
    assert not build_optimizer(nn.Linear(2, 2), optim, scaled=True).param_groups[0].get("fused")


@pytest.mark.parametrize("name", ["adamw", "lookahead_adamw", "sgd"])
@pytest.mark.parametrize("formats", [(PLAIN, LAST), (LAST, PLAIN)])
def test_state_of_another_memory_format_is_taken_over_as_values(name, formats):
    before, after = formats
    optim = Optim(name=name, lr=0.01, kwargs={"momentum": 0.9} if name == "sgd" else {})

    def network(memory_format):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        return model, build_optimizer(model, optim)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            model(torch.randn(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, theirs = network(after)
    steps(whole, theirs, range(6))
    half, ours = network(before)
    steps(half, ours, range(3))
    model, optimizer = network(after)
    model.load_state_dict(half.state_dict())
    optimizer.load_state_dict(ours.state_dict())
    match_formats(optimizer)
    steps(model, optimizer, range(3, 6))
    torch.testing.assert_close(model.weight, whole.weight, rtol=1e-4, atol=1e-5)


LISTED = [{"train_stats": "running", "update_stats": "none"}, {"layers": [":last"], "affine": "frozen"}]
PHOTOS = {"data.source": "photos", "model.name": "resnet18"}


@pytest.mark.parametrize(
    ("changes", "ranks", "rate"),
    [
        ({}, 1, 1e-3),  # the demo
        (PHOTOS | {"train.batch_size": 16}, 1, 3e-4),
        (PHOTOS | {"train.batch_size": 2}, 1, 1.06e-4),
        (PHOTOS | {"train.batch_size": 2, "train.grad_accum": 4}, 2, 3e-4),
        (PHOTOS | {"train.batch_size": 512}, 1, 1e-3),
        (PHOTOS | {"train.batch_size": 16, "optim.lr": 0.02}, 1, 0.02),
        (PHOTOS | {"train.batch_size": 2, "optim.name": "sgd"}, 1, 1e-3),
        (PHOTOS | {"train.batch_size": 2, "model.pretrained": False}, 1, 1e-3),
        (PHOTOS | {"train.batch_size": 16, "model.pretrained": False, "model.checkpoint": "w.pth"}, 1, 3e-4),
    ],
)
def test_the_rate_follows_the_images_of_an_update_where_pretrained_weights_are_at_stake(changes, ranks, rate):
    recipe = with_rate(load_recipe("freeze_bn", changes), ranks)
    assert recipe.optim.lr == rate
    assert with_rate(recipe, 1) == recipe
    groups = build_optimizer(nn.Linear(2, 2), recipe.optim).param_groups
    assert {group["lr"] for group in groups} == {rate}


@pytest.mark.parametrize(
    ("name", "changes", "rate"),
    [
        ("full", {"model.name": "test_resnet"}, 3e-4),
        ("full", {"model.name": "test_efficientnet"}, 3e-4),  # fused layers
        ("full", {"model.name": "test_vit"}, 1.06e-4),  # no BN
        ("full", {"model.name": "test_resnet", "train.batch_size": 64}, 6e-4),
        ("sync_bn", {"model.name": "test_resnet"}, 3e-4),
        ("precise_then_freeze", {"model.name": "test_resnet"}, 1.06e-4),
        ("freeze_stats", {"model.name": "test_resnet"}, 1.06e-4),
        ("full", {"model.name": "test_resnet", "bn.freeze_after": 0}, 1.06e-4),
        ("group_norm", {"model.name": "test_resnet"}, 1.06e-4),
        ("full", {"model.name": "test_resnet", "bn": LISTED}, 1.06e-4),
        ("full", {"model.name": "no_such_network"}, 1.06e-4),  # told when it is built
    ],
)
def test_small_batches_do_not_lower_the_rate_of_live_statistics(name, changes, rate):
    before = torch.get_rng_state()
    assert with_rate(load_recipe(name, PHOTOS | {"train.batch_size": 2} | changes), 1).optim.lr == rate
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "step", "multistep", "tanh", "poly"])
def test_schedules_count_updates_warm_up_and_end_where_they_should(name):
    optimizer = build_optimizer(nn.Linear(2, 2), Optim(name="sgd", lr=1.0))
    schedule = build_schedule(optimizer, Schedule(name=name, warmup_fraction=0.1), updates=100)
    rates = []
    for update in range(1, 102):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:11] == pytest.approx([step / 11 for step in range(1, 12)])
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates.index(max(rates)) == 10
    endings = {"constant": 1.0, "step": 1e-3, "multistep": 1e-2}
    assert rates[100] == pytest.approx(endings.get(name, 0.0), abs=0.01)


def test_linear_is_a_straight_line_after_warm_up():
    optimizer = build_optimizer(nn.Linear(2, 2), Optim(name="sgd", lr=1.0))
    schedule = build_schedule(optimizer, Schedule(name="linear", warmup_fraction=0.0), updates=10)
    for update in range(10):
        schedule.step_update(update + 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - update / 10)
