"""Each static rule fires on its pitfall, names the right layer, and is silent once its own fix line is applied."""

import copy
import functools
import pickle

import pytest
import timm
import torch
from torch import nn

import bnfinetune as bnf
from bnfinetune.diagnose.registry import all_rules
from tests.diagnose.support import FAMILIES, INNER, STAGE, codes, group_on_cpu, loader, network, paste, sgd, the


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def stage_of(model, name):
    return model.get_submodule(STAGE[name])


def stage_layers(model, name):
    return {each for each in bnf.find_bn_layers(model) if each.startswith(STAGE[name] + ".")}


def mended(found, model, *args, **kwargs):
    """Codes that are left after the fix line of a finding."""
    paste(found.fix, model=model, **kwargs.pop("scope", {}))
    return codes(bnf.check_bn(model, *args, **kwargs))


# freezing


def test_requires_grad_alone_leaves_statistics_moving(name):
    model = network(name)
    stage_of(model, name).requires_grad_(False)
    model.train()
    found = the(bnf.check_bn(model), "BN102")
    assert set(found.where) == stage_layers(model, name)
    assert found.severity == "error"
    assert "BN102" not in mended(found, model)


def test_a_model_wholly_in_evaluation_mode_is_judged_by_how_it_will_train(name):
    model = network(name).eval()
    stage_of(model, name).requires_grad_(False)
    assert "BN102" not in codes(bnf.check_bn(model))
    assert "BN102" in codes(bnf.check_bn(model, sgd(model)))


def test_half_a_freeze(name):
    model = network(name)
    layer = model.get_submodule(INNER[name])
    layer.eval()
    found = the(bnf.check_bn(model), "BN103")
    assert found.where == (INNER[name],)
    assert "BN103" not in mended(found, model)
    assert layer.weight.requires_grad  # the fix says what was there

    model = network(name)
    model.get_submodule(INNER[name]).bias.requires_grad = False
    found = the(bnf.check_bn(model), "BN103")
    assert found.where == (INNER[name],)
    assert "BN103" not in mended(found, model)


def test_track_running_stats_flipped(name):
    model = network(name)
    model.get_submodule(INNER[name]).track_running_stats = False
    found = the(bnf.check_bn(model), "BN104")
    assert found.where == (INNER[name],)
    assert "BN104" not in mended(found, model)


def test_running_statistics_removed(name):
    model = network(name)
    layer = model.get_submodule(INNER[name])
    layer.running_mean = layer.running_var = None
    found = the(bnf.check_bn(model), "BN105")
    assert found.where == (INNER[name],)
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert "BN105" not in mended(found, model.train())


@pytest.mark.parametrize("momentum", [0.0, 0.9, None])
def test_momentum_taken_for_something_else(name, momentum):
    model = network(name)
    model.get_submodule(INNER[name]).momentum = momentum
    found = the(bnf.check_bn(model), "BN106")
    assert found.where == (INNER[name],)
    assert "BN106" not in mended(found, model)


def test_timms_freezer_misses_batch_norm_1d():
    torch.manual_seed(0)
    model = timm.create_model("levit_128s", num_classes=5)
    for layer in bnf.find_bn_layers(model).values():
        layer.running_mean.normal_()
    all_1d = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    live = {n for n in all_1d if not n.startswith("head")}
    assert len(all_1d) == 48
    model = timm.layers.freeze_batch_norm_2d(model)
    found = the(bnf.check_bn(model), "BN107")
    assert set(found.where) == live
    assert "BN107" not in mended(found, model)


def test_frozen_at_untrained_statistics(name):
    model = timm.create_model(name)
    bnf.freeze_bn(model, layers=STAGE[name] + ".*")
    found = the(bnf.check_bn(model), "BN108")
    assert set(found.where) == stage_layers(model, name)
    assert "BN108" not in mended(found, model, scope={"loader": loader()})


def test_optimizer_from_before_the_unfreezing(name):
    model = network(name)
    bnf.freeze_bn(model)
    optimizer = sgd(model)
    bnf.unfreeze_bn(model, layers=STAGE[name] + ".*")
    found = the(bnf.check_bn(model, optimizer), "BN109")
    assert set(found.where) == stage_layers(model, name)
    scope = paste(found.fix, model=model, optimizer=optimizer)
    assert "BN109" not in codes(bnf.check_bn(model, scope["optimizer"]))


def test_optimizer_holds_the_parameters_that_a_conversion_replaced():
    model = network("resnet18")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = timm.layers.unfreeze_batch_norm_2d(timm.layers.freeze_batch_norm_2d(model))
    found = the(bnf.check_bn(model, optimizer), "BN109")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert "not the model's" in found.measured


CONVERTERS = {
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm": timm.layers.convert_sync_batchnorm,
    "frozen": timm.layers.freeze_batch_norm_2d,
}


@pytest.mark.parametrize("via", ["model", "copy", "pickle", "wrapped"])
@pytest.mark.parametrize("converter", CONVERTERS)
def test_a_converter_replaces_layers_under_a_policy(name, converter, via):
    model = bnf.freeze_bn(network(name), layers=STAGE[name] + ".*")
    assert "BN112" not in codes(bnf.check_bn(model))
    model = {
        "copy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "wrapped": nn.DataParallel,
        "model": lambda model: model,
    }[via](model)
    model = CONVERTERS[converter](model)
    found = the(bnf.check_bn(model), "BN112")
    assert set(found.where) == {each for each in bnf.find_bn_layers(model) if each.startswith(STAGE[name] + ".")}
    assert "BN112" not in mended(found, model)
    before = {key: tensor.clone() for key, tensor in stage_state(model, name).items()}
    if torch.cuda.is_available() or converter == "frozen":  # SyncBN's own forward, in the other stages, needs a GPU
        model.train()(torch.randn(2, 3, 32, 32))
    assert all(tensor.equal(before[key]) for key, tensor in stage_state(model, name).items())


def stage_state(model, name):
    return {key: tensor for key, tensor in model.state_dict().items() if f"{STAGE[name]}." in key}


def test_policies_that_others_undid_are_put_back_as_they_were(name):
    model = bnf.apply_policy(
        network(name), bnf.BNPolicy(train_stats="ghost", update_stats="cumulative", eval_stats="mix")
    )
    bnf.freeze_bn(model, layers=INNER[name])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    found = [each for each in bnf.check_bn(model) if each.code == "BN112"]
    assert [INNER[name]] in [list(each.where) for each in found]
    assert len(found) == 2
    for each in found:
        paste(each.fix, model=model)
    rows = {row.name: row[2:6] for row in bnf.describe_bn(model)}
    assert rows.pop(INNER[name]) == ("running", "none", "frozen", "mix")
    assert set(rows.values()) == {("ghost", "cumulative", "trained", "mix")}
    assert "BN112" not in codes(bnf.check_bn(model))


def test_a_restored_model_may_be_converted(name):
    model = bnf.restore_bn(bnf.freeze_bn(network(name)))
    assert "BN112" not in codes(bnf.check_bn(timm.layers.convert_sync_batchnorm(model)))
    model = bnf.freeze_bn(network(name))
    model.get_submodule(INNER[name].rpartition(".")[0]).add_module(INNER[name].rpartition(".")[2], nn.Identity())
    assert "BN112" not in codes(bnf.check_bn(model))  # no BN layer stands there, as after a fusion


def test_requires_grad_thaws_a_frozen_affine(name):
    model = bnf.freeze_bn(network(name))
    stage_of(model, name).requires_grad_(True)
    found = the(bnf.check_bn(model), "BN113")
    assert set(found.where) == stage_layers(model, name)
    assert "BN113" not in mended(found, model)
    assert not any(model.get_submodule(each).weight.requires_grad for each in found.where)
    bnf.unfreeze_bn(model)
    assert "BN113" not in codes(bnf.check_bn(model))


def test_a_forward_put_on_a_layer_under_a_policy(name):
    model = network(name)
    layer = model.get_submodule(INNER[name])
    layer.forward = lambda x: x
    assert "BN114" not in codes(bnf.check_bn(model))  # nothing was asked of it
    del layer.forward
    bnf.freeze_bn(model)
    layer.forward = functools.partial(type(layer).__bases__[-1].forward, layer)
    found = the(bnf.check_bn(model), "BN114")
    assert found.where == (INNER[name],)
    assert "BN114" not in mended(found, model)
    model.train()(torch.randn(2, 3, 32, 32))
    assert "forward" not in vars(layer)


def test_a_live_stage_between_frozen_ones():
    model = network("resnet18")
    for frozen in (model.bn1, model.layer1, model.layer3):
        frozen.requires_grad_(False).eval()
    found = the(bnf.check_bn(model), "BN110")
    assert set(found.where) == {each for each in bnf.find_bn_layers(model) if each.startswith("layer2.")}
    assert "BN110" not in mended(found, model)


def test_a_live_end_is_no_hole():
    model = network("resnet18")
    for frozen in (model.bn1, model.layer1, model.layer2):
        frozen.requires_grad_(False).eval()
    assert "BN110" not in codes(bnf.check_bn(model))


def test_frozen_by_mode_only(name):
    model = network(name)
    stage_of(model, name).requires_grad_(False).eval()
    found = the(bnf.check_bn(model), "BN111")
    assert set(found.where) == stage_layers(model, name)
    assert "BN111" not in mended(found, model)


# data and batches


def test_too_few_steps(name):
    model = network(name)
    found = the(bnf.check_bn(model, steps=10), "BN202")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert f"{0.9**10:.0%}" in found.measured
    assert "BN202" not in mended(found, model, steps=10)
    assert "BN202" not in codes(bnf.check_bn(network(name), steps=10, grad_accum=4))
    assert "BN202" not in codes(bnf.check_bn(network(name), steps=40))


def test_three_steps_leave_no_momentum_that_would_do(name):
    model = network(name)
    assert "BN202" not in mended(the(bnf.check_bn(model, steps=3), "BN202"), model, steps=3)


class Pooled(nn.Module):
    """A convolution, and a BN layer on one value per image and channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.neck, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.neck(self.norm(self.conv(x)).mean((2, 3))))


def test_last_batch_of_one():
    model, data = Pooled(), loader(33)
    found = the(bnf.check_bn(model, loader=data, input_size=(3, 32, 32)), "BN205")
    assert found.where == ("neck",)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        [model(images) for images, _ in data]
    scope = paste(found.fix, loader=data)
    [model(images) for images, _ in scope["loader"]]
    assert "BN205" not in codes(bnf.check_bn(model, loader=scope["loader"], input_size=(3, 32, 32)))
    assert "BN205" not in codes(bnf.check_bn(model, loader=loader(34), input_size=(3, 32, 32)))


def test_one_image_left_is_enough_where_maps_are_larger():
    model = network("resnet18")
    assert "BN205" not in codes(bnf.check_bn(model, loader=loader(33), input_size=(3, 64, 64)))
    found = the(bnf.check_bn(model, loader=loader(33), input_size=(3, 32, 32)), "BN205")
    assert set(found.where) == {each for each in bnf.find_bn_layers(model) if each.startswith("layer4.")}


def test_dropping_the_only_batch():
    model, data = network("resnet18"), loader(9, drop_last=True)
    found = the(bnf.check_bn(model, loader=data), "BN205")
    scope = paste(found.fix, loader=data)
    assert "BN205" not in codes(bnf.check_bn(model, loader=scope["loader"]))


def test_looking_for_feature_maps_changes_nothing(name):
    model = network(name)
    model.get_submodule(INNER[name]).eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    bnf.check_bn(model, loader=loader(33), input_size=(3, 32, 32))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_few_images_per_statistic(name):
    model = network(name)
    found = the(bnf.check_bn(model, batch_size=2), "BN206")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert "BN206" not in mended(found, model, batch_size=2)
    assert "BN206" not in codes(bnf.check_bn(network(name), batch_size=8))


def test_few_images_on_many_processes_are_joined(name):
    model = network(name)
    found = the(bnf.check_bn(model, batch_size=2, ranks=8), "BN206")
    assert "sync" in found.fix
    assert "BN206" not in mended(found, model, batch_size=2, ranks=8)


def test_small_ghosts_are_few_images(name):
    model = network(name)
    bnf.apply_policy(model, bnf.BNPolicy(train_stats="ghost", ghost_size=4, layers=INNER[name]))
    assert the(bnf.check_bn(model, batch_size=32), "BN206").where == (INNER[name],)


def test_accumulation(name):
    model = network(name)
    found = the(bnf.check_bn(model, batch_size=8, grad_accum=4), "BN207")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert "BN207" not in mended(found, model, batch_size=8, grad_accum=4)
    assert "BN207" not in codes(bnf.check_bn(network(name), batch_size=64, grad_accum=4))


def sorted_loader(images=40, **options):
    data = loader(images, shuffle=False, **options)
    data.dataset.tensors = (data.dataset.tensors[0], data.dataset.tensors[1].sort().values)
    return data


def test_sorted_loader(name):
    model, data = network(name), sorted_loader(batch_size=8)
    found = the(bnf.check_bn(model, loader=data), "BN208")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    scope = paste(found.fix, loader=data)
    assert "BN208" not in codes(bnf.check_bn(model, loader=scope["loader"]))


def test_stored_order_that_is_mixed_is_fine():
    assert "BN208" not in codes(bnf.check_bn(network("resnet18"), loader=loader(40, batch_size=8, shuffle=False)))


def test_stored_order_without_live_statistics_is_fine():
    model = bnf.freeze_bn(network("resnet18"))
    assert "BN208" not in codes(bnf.check_bn(model, loader=sorted_loader(batch_size=8)))


def test_other_resolution(name):
    model = network(name)
    found = the(bnf.check_bn(model, train_size=32, eval_size=48), "BN210")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert "BN210" not in mended(found, model, train_size=32, eval_size=48, scope={"loader": loader(size=48)})
    assert "BN210" not in codes(bnf.check_bn(network(name), train_size=48, eval_size=48))


# hidden forwards


def test_linear_probe_with_live_statistics(name):
    model = network(name).requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    found = the(bnf.check_bn(model), "BN305")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert "BN102" not in codes(bnf.check_bn(model))  # one voice is enough
    assert "BN305" not in mended(found, model)


def test_features_extracted_in_training_mode(name):
    model = network(name).requires_grad_(False)
    assert "BN305" in codes(bnf.check_bn(model))
    assert "BN305" not in codes(bnf.check_bn(model.eval()))


# several processes


def test_torchs_sync_converter_drops_fused_activations():
    source = network("efficientnet_b0")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(source))
    activated = {n for n, m in source.named_modules() if hasattr(m, "act") and not isinstance(m.act, nn.Identity)}
    activated &= set(bnf.find_bn_layers(source))
    found = the(bnf.check_bn(model, source=source), "BN403")
    assert set(found.where) == activated
    assert "BN403" in codes(bnf.check_bn(model))
    scope = paste(found.fix, model=model, source=source)
    assert "BN403" not in codes(bnf.check_bn(scope["model"], source=source))


def test_sound_sync_conversions_keep_activations():
    for name in FAMILIES:
        model = timm.layers.convert_sync_batchnorm(network(name))
        assert "BN403" not in codes(bnf.check_bn(model))
        assert "BN403" not in codes(bnf.check_bn(nn.SyncBatchNorm.convert_sync_batchnorm(network("resnet18"))))


def test_sync_batch_norm_on_the_cpu(name):
    model = timm.layers.convert_sync_batchnorm(network(name))
    with group_on_cpu():
        found = the(bnf.check_bn(model), "BN404")
        assert set(found.where) == set(bnf.find_bn_layers(model))
        assert "BN404" not in mended(found, model)


def test_synchronised_across_machines(name):
    model = network(name)
    bnf.apply_policy(model, bnf.BNPolicy(train_stats="sync", layers=STAGE[name] + ".*"))
    two_nodes = {"ranks": 16, "ranks_per_node": 8, "batch_size": 32}
    found = the(bnf.check_bn(model, **two_nodes), "BN406")
    assert set(found.where) == stage_layers(model, name)
    assert "BN406" not in mended(found, model, **two_nodes)
    assert "BN406" not in codes(bnf.check_bn(model, ranks=8, ranks_per_node=8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision(name, dtype):
    model = network(name).to(dtype)
    found = the(bnf.check_bn(model), "BN407")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert "BN407" not in mended(found, model)


# numerics and optimizer


@pytest.mark.parametrize(
    ("key", "value"), [("running_mean", torch.nan), ("running_var", torch.inf), ("running_var", -1.0)]
)
def test_poisoned_statistics(name, key, value):
    model = network(name)
    getattr(model.get_submodule(INNER[name]), key)[1] = value
    found = the(bnf.check_bn(model), "BN501")
    assert found.where == (INNER[name],)
    assert "BN501" not in mended(found, model, scope={"loader": loader()})


def test_settings_lost_in_a_conversion():
    source = network("resnet18")
    for layer in bnf.find_bn_layers(source).values():
        layer.momentum = 0.01
    model = timm.layers.unfreeze_batch_norm_2d(timm.layers.freeze_batch_norm_2d(copy.deepcopy(source)))
    found = the(bnf.check_bn(model, source=source), "BN502")
    assert set(found.where) == set(bnf.find_bn_layers(source))
    assert "momentum 0.01 became 0.1" in found.measured
    assert "BN502" not in mended(found, model, source=source, scope={"source": source})


@pytest.mark.parametrize("change", ["eps", "variance"])
def test_one_layer_changed_in_a_conversion(name, change):
    source = network(name)
    model = copy.deepcopy(source)
    layer = model.get_submodule(INNER[name])
    if change == "eps":
        layer.eps = 0.0
    else:
        layer.running_var[0] += 1e-3
    found = the(bnf.check_bn(model, source=source), "BN502")
    assert found.where == (INNER[name],)
    assert "BN502" not in mended(found, model, source=source, scope={"source": source})


def test_our_own_round_trip_loses_nothing(name):
    source = network(name)
    model = bnf.unfreeze_bn(bnf.freeze_bn(copy.deepcopy(source)))
    assert "BN502" not in codes(bnf.check_bn(model, source=source))


def test_weight_decay(name):
    model = network(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    found = the(bnf.check_bn(model, optimizer), "BN503")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert found.severity == "info"
    scope = paste(found.fix, model=model, optimizer=optimizer)
    assert "BN503" not in codes(bnf.check_bn(model, scope["optimizer"]))
    assert scope["optimizer"].param_groups[0]["lr"] == 1e-3
    assert max(group["weight_decay"] for group in scope["optimizer"].param_groups) == 0.05


def test_frozen_parameter_with_a_leftover_gradient(name):
    model = network(name)
    optimizer = sgd(model, lr=0.1)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    layer = model.get_submodule(INNER[name])
    layer.requires_grad_(False)
    found = the(bnf.check_bn(model, optimizer), "BN504")
    assert found.where == (INNER[name],)
    before = layer.weight.clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)  # it does move
    paste(found.fix, optimizer=optimizer)
    assert "BN504" not in codes(bnf.check_bn(model, optimizer))


# averaging, checkpoints, deployment


def averaged_pair(name, **options):
    model = network(name)
    averaged = torch.optim.swa_utils.AveragedModel(model, **options)
    averaged.update_parameters(model)
    model.train()(torch.randn(8, 3, 32, 32))
    with torch.no_grad():
        model.conv_stem.weight.mul_(1.1) if name == "efficientnet_b0" else model.conv1.weight.mul_(1.1)
    averaged.update_parameters(model)
    return model, averaged


def test_averaged_weights_with_foreign_statistics(name):
    model, averaged = averaged_pair(name)
    found = the(bnf.check_bn(model, averaged=averaged), "BN601")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    paste(found.fix, averaged=averaged, loader=loader())
    assert "BN601" not in codes(bnf.check_bn(model, averaged=averaged))


def test_an_average_of_frozen_statistics_keeps_them(name):
    model = network(name)
    stage_of(model, name).eval()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert "BN606" not in codes(bnf.check_bn(model, averaged=averaged))
    torch.optim.swa_utils.update_bn(loader(), averaged)
    found = the(bnf.check_bn(model, averaged=averaged), "BN606")
    assert set(found.where) == stage_layers(model, name)
    paste(found.fix, model=model, averaged=averaged)
    assert "BN606" not in codes(bnf.check_bn(model, averaged=averaged))


def test_a_folded_model_that_was_taken_apart(name):
    model = network(name).eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = model(images)
    bnf.fold_bn(bnf.freeze_bn(model), images)
    conv = next(row.conv for row in bnf.fold_report(model) if row.layer == INNER[name])
    assert "BN607" not in codes(bnf.check_bn(model))
    assert "BN607" not in codes(bnf.check_bn(copy.deepcopy(model)))
    of_conv, of_bn = copy.deepcopy(model), copy.deepcopy(model)
    of_conv.set_submodule(conv, copy.deepcopy(bnf.unfold_bn(copy.deepcopy(model)).get_submodule(conv)))
    of_bn.set_submodule(INNER[name], copy.deepcopy(network(name).get_submodule(INNER[name])))
    for parted, left in ((of_conv, INNER[name]), (of_bn, conv)):
        found = the(bnf.check_bn(parted), "BN607")
        assert found.where == (left,)
        torch.testing.assert_close(parted.eval()(images), wanted)  # a pity, but not wrong
        assert "BN607" not in mended(found, parted)


def test_averages_of_layers_under_a_policy_are_re_estimated_around_them(name):
    model = network(name)
    frozen = stage_layers(model, name)
    bnf.freeze_bn(model, layers=f"{STAGE[name]}.*")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    found = the(bnf.check_bn(model, averaged=averaged), "BN601")
    assert not set(found.where) & frozen
    paste(found.fix, averaged=averaged, loader=loader())
    assert not codes(bnf.check_bn(model, averaged=averaged)) & {"BN601", "BN606"}


def test_averaged_buffers_are_fine(name):
    model, averaged = averaged_pair(name, use_buffers=True)
    assert "BN601" not in codes(bnf.check_bn(model, averaged=averaged))


def test_checkpoint_without_buffers(name, tmp_path):
    model = network(name)
    path = tmp_path / "model.pt"
    torch.save(dict(model.named_parameters()), path)
    for saved in (path, dict(model.named_parameters())):
        found = the(bnf.check_bn(model, saved=saved), "BN602")
        assert set(found.where) == set(bnf.find_bn_layers(model))
    found = the(bnf.check_bn(model, saved=path), "BN602")
    paste(found.fix, model=model)
    assert "BN602" not in codes(bnf.check_bn(model, saved=path))


def test_checkpoints_of_wrapped_models_and_safetensors_are_complete(name, tmp_path):
    from safetensors.torch import save_file

    model = network(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert "BN602" not in codes(bnf.check_bn(model, saved=tmp_path / "model.safetensors"))
    wrapped = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    assert "BN602" not in codes(bnf.check_bn(model, saved={"state_dict": wrapped}))


def test_unreadable_checkpoint_is_one_line(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"nothing")
    with pytest.raises(bnf.errors.CheckpointError, match=r"model\.pt is neither"):
        bnf.check_bn(network("resnet18"), saved=tmp_path / "model.pt")


def test_exported_in_training_mode():
    model, images = Pooled(), torch.randn(4, 3, 32, 32)
    exported = torch.export.export(model.train(), (images,))
    found = the(bnf.check_bn(model, exported=exported), "BN603")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    scope = paste(found.fix, model=model, example_inputs=(images,))
    assert "BN603" not in codes(bnf.check_bn(model, exported=scope["exported"]))


def test_pretrained_batch_norm_swapped_for_group_norm():
    source = network("resnet18")
    model = copy.deepcopy(source)
    for each in ("layer1.0.bn1", "layer1.0.bn2"):
        parent, _, key = each.rpartition(".")
        setattr(model.get_submodule(parent), key, nn.GroupNorm(8, 64))
    found = the(bnf.check_bn(model, source=source), "BN604")
    assert set(found.where) == {"layer1.0.bn1", "layer1.0.bn2"}
    scope = paste(found.fix, source=source)
    assert "BN604" not in codes(bnf.check_bn(scope["model"], source=source))


def test_a_model_without_any_batch_norm_left_is_judged_by_its_source():
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(source[0], nn.GroupNorm(2, 8))
    assert codes(bnf.check_bn(model, source=source)) == {"BN604"}


def test_every_static_rule_has_its_test():
    import re
    from pathlib import Path

    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert set(re.findall(r"BN\d\d\d", here)) >= set(all_rules())


# sound set-ups


@pytest.mark.parametrize("each", ["resnet18", "efficientnet_b0", "mobilenetv3_small_100", "regnety_002", "levit_128s"])
def test_plain_timm_training_is_silent(each):
    import timm.optim

    torch.manual_seed(0)
    model = timm.create_model(each)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    found = bnf.check_bn(model, optimizer, loader(64), steps=1000, train_size=224, eval_size=224)
    assert not found, str(found)


@pytest.mark.parametrize("affine", [True, False])
def test_policies_are_silent(name, affine):
    model = bnf.freeze_bn(network(name), affine=affine)
    found = bnf.check_bn(model, sgd(model), loader(64, batch_size=2), grad_accum=8, steps=3)
    assert not found, str(found)


def test_natively_frozen_layers_are_silent(name):
    model = timm.layers.freeze_batch_norm_2d(network(name))
    found = bnf.check_bn(model, sgd(model), loader(64, batch_size=2), grad_accum=8, steps=3)
    assert not found, str(found)
