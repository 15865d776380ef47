"""precise_bn against a float64 oracle: exactness, invariance, forms of data and of model, limits, report."""

from __future__ import annotations

import copy
import json
import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d
from timm.utils import ModelEmaV3
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, domain, find_bn_layers, freeze_bn
from bnfinetune.bn.folding.fold import fold_bn, fold_report
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.errors import SelectionError, ShortDataError, StatisticsError
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of, toy
from tests.bn.statistics.oracle import inputs_of_layers, mean_of_variances, pooled, relative_errors

SIZES = (8, 5, 2, 7)


def batches_of(sizes=SIZES, size: int = 32) -> list[torch.Tensor]:
    return [images(n, size, seed) * (1 + seed) + seed for seed, n in enumerate(sizes)]


def assert_exact(model, inputs, estimate=pooled, tolerance=1e-6):
    for name, layer in find_bn_layers(model).items():
        off_mean, off_var = relative_errors(layer, inputs[name], estimate)
        assert off_mean < tolerance, (name, off_mean)
        assert off_var < tolerance, (name, off_var)


def statistics_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors_of(model).items() if "running" in key}


# --- exactness


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_statistics_equal_the_pooled_float64_oracle(name, training):
    model, batches = backbone(name).train(training), batches_of()
    inputs = inputs_of_layers(model, batches)
    before = tensors_of(model)
    report = precise_bn(model, batches)
    assert_exact(model, inputs)
    assert set(report.layers) == set(find_bn_layers(model))
    assert (report.samples, report.batches) == (sum(SIZES), len(SIZES))
    changed = differing(tensors_of(model), before)
    assert changed
    assert all("running" in key for key in changed)  # weights and counters stay
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_the_mean_of_unbiased_batch_variances_equals_its_own_oracle(name):
    model, batches = backbone(name), batches_of()
    inputs = inputs_of_layers(model, batches)
    precise_bn(model, batches, variance="mean")
    assert_exact(model, inputs, mean_of_variances)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_ema_equals_training_mode_forwards_of_pytorch(momentum):
    model, batches = backbone("resnet18").eval(), batches_of()
    find_bn_layers(model)["layer1.0.bn1"].momentum = None  # cumulative
    twin = copy.deepcopy(model)
    for layer in find_bn_layers(twin).values():
        layer.train()
        layer.momentum = layer.momentum if momentum is None else momentum
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    precise_bn(model, batches, variance="ema", momentum=momentum)
    for key, value in tensors_of(model).items():
        torch.testing.assert_close(value, twin.state_dict()[key], rtol=2e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_a_batch_of_one_value_moves_the_mean_of_an_ema_and_not_its_variance(momentum):
    model = nn.Sequential(nn.BatchNorm1d(3))
    many, one = images(6, 1).flatten(1), torch.tensor([[5.0, -3.0, 2.0]])
    precise_bn(model, [many], variance="ema", momentum=momentum or 0.3)
    before = tensors_of(model)
    model[0].momentum = momentum
    model[0].num_batches_tracked.fill_(1)
    precise_bn(model, [one], variance="ema", momentum=momentum)
    weight = 0.5 if momentum is None else momentum
    assert model[0].running_var.equal(before["0.running_var"])
    torch.testing.assert_close(model[0].running_mean, torch.lerp(before["0.running_mean"], one[0], weight))


@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 6, 5), (3, 2, 3, 2)])
def test_large_means_and_tiny_deviations_keep_their_precision(shift, shape):
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    model = nn.Sequential(norm(3))
    batches = [shift + 0.01 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(n)) for n in (40, 7, 64)]
    inputs = inputs_of_layers(model, batches)
    report = precise_bn(model, batches)
    assert_exact(model, inputs)
    if shift >= 100 or len(shape) == 1:
        assert report.reread == ("0",)
        assert "re-read" in str(report)
    elif shift == 0:
        assert report.reread == ()


@pytest.mark.parametrize("build", [toy, lambda: backbone("resnet18"), lambda: backbone("efficientnet_b0")])
def test_images_of_mean_1000_and_deviation_001(build):
    model = build()
    batches = [1000 + 0.01 * images(n, 32, n) for n in (8, 5)]
    inputs = inputs_of_layers(model, batches)
    report = precise_bn(model, batches)
    assert_exact(model, inputs)
    if isinstance(model, nn.Sequential):  # zero padding, which the others have, spreads the first layer's values
        assert report.reread == ("1",)


def test_constant_channels_are_no_reason_to_read_again():
    x = images(8, 6)
    x[:, 1] = 0.0
    x[:, 2] = 123.4
    model = nn.Sequential(nn.BatchNorm2d(3))
    report = precise_bn(model, [x])
    assert report.reread == ()
    torch.testing.assert_close(model[0].running_mean[1:], torch.tensor([0.0, 123.4]))
    assert model[0].running_var[1] == 0
    assert model[0].running_var[2] < 1e-9


@pytest.mark.parametrize("name", BACKBONES)
def test_channels_last_models_are_as_exact(name):
    model = backbone(name).to(memory_format=torch.channels_last)
    batches = [batch.to(memory_format=torch.channels_last) for batch in batches_of()]
    inputs = inputs_of_layers(model, batches)
    precise_bn(model, batches)
    assert_exact(model, inputs)


def test_the_first_layer_does_not_depend_on_the_split_into_batches():
    data = torch.cat(batches_of())
    results = []
    for sizes in ([22], [1] * 22, [3, 19], [8, 5, 2, 7], [21, 1]):
        model = toy()
        precise_bn(model, data.split(sizes))
        results.append((model[1].running_mean, model[1].running_var))
    for mean, var in results[1:]:
        torch.testing.assert_close(mean, results[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(var, results[0][1], rtol=1e-6, atol=0)


# --- what takes part


def test_deselected_layers_use_and_keep_their_stored_statistics():
    model, batches = backbone("resnet18"), batches_of()
    names = [name for name in find_bn_layers(model) if name.startswith("layer2")]
    inputs = inputs_of_layers(model, batches, names)
    before = statistics_of(model)
    precise_bn(model, batches, layers="layer2.*")
    for name in names:
        assert max(relative_errors(find_bn_layers(model)[name], inputs[name])) < 1e-6
    changed = differing(statistics_of(model), before)
    assert {key.rsplit(".", 1)[0] for key in changed} == set(names)


@pytest.mark.parametrize("eval_stats", ["batch", "mix"])
def test_deselected_layers_use_stored_statistics_whatever_their_evaluation_switch(eval_stats):
    model, batches = toy(BatchNormAct2d), batches_of()
    plain = copy.deepcopy(model)
    apply_policy(model, BNPolicy(eval_stats=eval_stats, layers="1"))
    for net in (model, plain):
        precise_bn(net, batches, exclude="1")
    assert not differing(statistics_of(model), statistics_of(plain))


@pytest.mark.parametrize("train_stats", ["batch", "ghost", "renorm", "stochastic"])
def test_selected_layers_normalise_by_the_batch_whatever_their_training_switch(train_stats):
    model, batches = toy(BatchNormAct2d), batches_of()
    plain = copy.deepcopy(model)
    apply_policy(model, BNPolicy(train_stats=train_stats, eval_stats="batch"))
    precise_bn(model, batches)
    precise_bn(plain, batches)
    assert not differing(statistics_of(model), statistics_of(plain))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_layers_frozen_by_a_policy_are_updated_only_on_request(norm):
    model, batches = toy(norm), batches_of()
    plain = copy.deepcopy(model)
    freeze_bn(model)
    before = statistics_of(model)
    with pytest.raises(StatisticsError, match="include_frozen=True"):
        precise_bn(model, batches)
    assert not differing(statistics_of(model), before)
    precise_bn(model, batches, include_frozen=True)
    precise_bn(plain, batches)
    assert not differing(statistics_of(model), statistics_of(plain))


def test_folded_layers_are_unfolded_for_the_pass_and_folded_again():
    model, plain = freeze_bn(toy(BatchNormAct2d)).eval(), toy(BatchNormAct2d).eval()
    fold_bn(model, images())
    folded = fold_report(model).folded
    assert folded
    precise_bn(model, batches_of(), include_frozen=True)
    precise_bn(plain, batches_of())
    assert fold_report(model).folded == folded
    assert not differing(statistics_of(model), statistics_of(plain))
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-4, atol=1e-5)


def test_a_domain_gets_statistics_of_its_own():
    model, plain = toy(), toy()
    before = statistics_of(model)
    apply_policy(model, BNPolicy(domains="target"))
    with domain(model, "target"):
        precise_bn(model, batches_of())
        inside = model.eval()(images())
    precise_bn(plain, batches_of())
    assert not differing(statistics_of(model), before)
    assert torch.equal(inside, plain.eval()(images()))


def test_partly_frozen_models_update_the_rest_and_say_so():
    model = backbone("resnet18")
    freeze_bn(model, affine=False, layers="layer1.*")
    before = statistics_of(model)
    report = precise_bn(model, batches_of())
    assert report.frozen == tuple(name for name in find_bn_layers(model) if name.startswith("layer1"))
    assert not any(key.startswith("layer1") for key in differing(statistics_of(model), before))
    assert "kept, frozen: layer1.0.bn1" in str(report)


def test_frozen_classes_are_recalibrated_on_request():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    plain = torchvision.models.resnet18()
    plain.load_state_dict(model.state_dict(), strict=False)
    precise_bn(plain, batches_of())
    precise_bn(model, batches_of(), include_frozen=True)
    ours, theirs = statistics_of(model), statistics_of(plain)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key])


class Branching(nn.Module):
    """A layer called twice in each forward, one never called, and dropout that would change everything."""

    def __init__(self):
        super().__init__()
        self.twice = nn.BatchNorm2d(3)
        self.never = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return self.drop(self.untracked(self.twice(x) + self.twice(3 * x + 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [SIZES, [3] * 20])  # the latter more calls than a recorder's block holds
def test_every_call_counts_and_layers_never_called_keep_their_statistics(sizes, dtype):
    model, batches = Branching().to(dtype), [x.to(dtype) for x in batches_of(sizes, 16)]
    before = tensors_of(model)
    report = precise_bn(model, batches)
    values = torch.cat([torch.cat([x, 3 * x + 1]) for x in batches]).double()
    torch.testing.assert_close(model.twice.running_mean.double(), values.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.twice.running_var.double(), values.var((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    assert report.layers["twice"].values == 2 * sum(sizes) * 16 * 16
    assert report.uncalled == ("never",)
    assert report.untracked == ("untracked",)
    assert not [key for key in differing(tensors_of(model), before) if not key.startswith("twice.running")]
    assert "never called: never" in str(report)


def test_a_layer_with_one_value_per_channel_counts_it_with_variance_zero():
    norm = nn.BatchNorm1d(3)
    nn.init.normal_(norm.bias)
    outputs = []
    model = nn.Sequential(norm, nn.Identity())
    model[1].register_forward_hook(lambda *args: outputs.append(args[2]))
    data = torch.randn(5, 3)
    precise_bn(model, data.split([4, 1]))
    torch.testing.assert_close(norm.running_mean, data.mean(0), rtol=1e-6, atol=1e-7)
    assert torch.equal(outputs[1], norm.bias.detach()[None])
    last, first = data[4].double(), data[:4].double()
    expected = (4 * first.var(0, correction=0) + 4 * (first.mean(0) - data.double().mean(0)) ** 2) / 5
    expected += (last - data.double().mean(0)) ** 2 / 5
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-6, atol=0)


def test_the_mean_of_variances_leaves_out_batches_without_one():
    norm = nn.BatchNorm1d(3)
    data = torch.randn(9, 3)
    precise_bn(nn.Sequential(norm), data.split([4, 1, 4]), variance="mean")
    expected = (data[:4].var(0) + data[5:].var(0)) / 2
    torch.testing.assert_close(norm.running_var, expected, rtol=1e-6, atol=0)
    before = norm.running_var.clone()
    with pytest.raises(StatisticsError, match="more than one value per channel"):
        precise_bn(nn.Sequential(norm), data.split(1), variance="mean")
    assert torch.equal(norm.running_var, before)


# --- forms of batches and models


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
        lambda x: [x, "anything"],
        lambda x: {"image": x, "label": 0},
        lambda x: {"pixel_values": x},
        lambda x: UserDict(x=x, y=0),
        lambda x: ({"image": x}, 0),
    ],
    ids=["tuple", "list", "image", "pixel_values", "x", "nested"],
)
def test_batches_of_any_form(wrap):
    model, plain = toy(), toy()
    precise_bn(model, (wrap(x) for x in batches_of()))
    precise_bn(plain, batches_of())
    assert not differing(statistics_of(model), statistics_of(plain))


def test_forward_gets_the_whole_batch():
    model, plain = toy(), toy()
    batches = [{"first": x, "weight": 2.0} for x in batches_of()]
    precise_bn(model, batches, forward=lambda net, batch: net(batch["first"] * batch["weight"]))
    precise_bn(plain, [2 * x for x in batches_of()])
    assert not differing(statistics_of(model), statistics_of(plain))


@pytest.mark.parametrize("batch", [{"picture": 1}, "text", []])
def test_batches_of_unknown_form_are_refused_with_the_remedy(batch):
    with pytest.raises(StatisticsError, match="pass forward="):
        precise_bn(toy(), [batch])


def test_single_images_instead_of_batches_are_refused():
    with pytest.raises((ValueError, RuntimeError), match="4D input"):
        precise_bn(toy(), images(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precision(dtype):
    model, batches = toy().to(dtype), [x.to(dtype) for x in batches_of(SIZES * 5, 8)]  # more than one block
    inputs = inputs_of_layers(model, batches, ["1"])
    precise_bn(model, batches)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-12
    assert max(relative_errors(model[1], inputs["1"])) < tolerance
    assert model[1].running_mean.dtype == dtype


def test_autocast_reads_what_the_layer_sees():
    model, batches = toy(), batches_of()
    with torch.autocast("cpu", torch.bfloat16):
        inputs = inputs_of_layers(model, batches, ["1"])
        precise_bn(model, batches)
    assert max(relative_errors(model[1], inputs["1"])) < 1e-6
    assert model[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("compiled", ["wrapper", "in place", "submodule"])
def test_compiled_models(compiled):
    model, plain, compilations = toy(), toy(), []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    if compiled == "wrapper":
        net = torch.compile(model, backend=backend)
    elif compiled == "in place":
        net = model
        net.compile(backend=backend)
    else:
        net = nn.Sequential(torch.compile(nn.Sequential(*model), backend=backend))
    x = images()
    net.train()(x), plain.train()(x)  # traced before the pass
    traced = len(compilations)
    precise_bn(net, batches_of())
    precise_bn(plain, batches_of())
    for ours, theirs in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    net(x)
    assert len(compilations) == traced > 0  # the pass neither compiles anything nor invalidates what was compiled
    plain(x)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))


def test_data_parallel_wrappers_are_taken_off():
    model, plain = toy(), toy()
    precise_bn(nn.DataParallel(model), batches_of())
    precise_bn(plain, batches_of())
    assert not differing(statistics_of(model), statistics_of(plain))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_weights_get_their_own_exact_statistics(average, name):
    model, batches = backbone(name), batches_of()
    averaged = torch.optim.swa_utils.AveragedModel(model) if average == "swa" else ModelEmaV3(model, decay=0.9)
    with torch.no_grad():
        for step in range(2):
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * step)
            averaged.update_parameters(model) if average == "swa" else averaged.update(model)
    inner, kept = averaged.module, tensors_of(model)
    inputs = inputs_of_layers(inner, batches)
    precise_bn(averaged, batches)
    assert_exact(inner, inputs)
    assert not differing(tensors_of(model), kept)


def test_modes_hooks_and_buffers_stay():
    model = toy()
    model[1].eval()
    seen = []
    model[1].register_forward_hook(lambda *args: seen.append(1))
    modes = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())
    precise_bn(model, batches_of())
    assert modes == [module.training for module in model.modules()]
    assert len(seen) == len(SIZES)
    assert all(buffers[key] is buffer for key, buffer in model.named_buffers())
    assert "forward" not in vars(model[1])


# --- limits


def test_num_batches_reads_exactly_so_many():
    source = iter(batches_of())
    model, plain = toy(), toy()
    report = precise_bn(model, source, num_batches=2)
    precise_bn(plain, batches_of()[:2])
    assert not differing(statistics_of(model), statistics_of(plain))
    assert report.batches == 2
    assert len(list(source)) == 2


@pytest.mark.parametrize("wanted", [1, 8, 10, 22])
def test_num_samples_cuts_the_last_batch(wanted):
    model = toy()
    labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches_of()]
    report = precise_bn(model, labelled, num_samples=wanted, layers="1")
    plain = toy()
    precise_bn(plain, [torch.cat(batches_of())[:wanted]], layers="1")
    torch.testing.assert_close(model[1].running_var, plain[1].running_var, rtol=1e-6, atol=0)
    assert report.samples == wanted


@pytest.mark.parametrize("limit", [{"num_batches": 5}, {"num_samples": 23}, {"num_batches": 5, "tolerance": 0.01}])
def test_data_that_ends_before_a_limit_is_an_error_and_changes_nothing(limit):
    model = toy()
    before = tensors_of(model)
    with pytest.raises(ShortDataError, match="the data ended after"):
        precise_bn(model, batches_of(), **limit)
    assert not differing(tensors_of(model), before)


def test_no_data_is_an_error():
    with pytest.raises(StatisticsError, match="no batch"):
        precise_bn(toy(), [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_batches": 0}, "num_batches=0"),
        ({"num_samples": 1.5}, "num_samples=1.5"),
        ({"num_batches": 1, "num_samples": 1}, "choose one"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"tolerance": 0.1, "variance": "ema"}, "never vanishes"),
        ({"variance": "median"}, "pooled, mean, ema"),
        ({"momentum": 0.1}, "variance='ema'"),
        ({"momentum": 2.0, "variance": "ema"}, "at most 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(StatisticsError, match=message):
        precise_bn(toy(), batches_of(), **arguments)


def test_selections_that_select_nothing_are_refused():
    with pytest.raises(SelectionError, match="'laier"):
        precise_bn(toy(), batches_of(), layers="laier*")
    with pytest.raises(SelectionError, match="no BatchNorm"):
        precise_bn(nn.Sequential(nn.Conv2d(3, 3, 1)), batches_of())
    with pytest.raises(StatisticsError, match="no running statistics"):
        precise_bn(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), batches_of())


# --- report


def test_the_report_says_how_far_statistics_moved(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(3, eps=1e-3))
    old_mean, old_var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 4.0])
    model[0].running_mean.copy_(old_mean)
    model[0].running_var.copy_(old_var)
    report = precise_bn(model, batches_of())
    x = torch.cat(batches_of()).double()
    shift = ((x.mean((0, 2, 3)) - old_mean) / (old_var + 1e-3).sqrt()).abs()
    ratio = (x.var((0, 2, 3), correction=0) + 1e-3) / (old_var + 1e-3)
    change = report.layers["0"]
    np.testing.assert_allclose(change.mean_shift, shift.max(), rtol=1e-6)
    np.testing.assert_allclose(change.mean_shift_rms, shift.square().mean().sqrt(), rtol=1e-6)
    np.testing.assert_allclose((change.var_ratio_min, change.var_ratio_max), (ratio.min(), ratio.max()), rtol=1e-6)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["layers"]["0"]["mean_shift"] == change.mean_shift
    assert saved["samples"] == 22
    assert "1 layers from 22 samples in 4 batches" in str(report)


def test_a_second_pass_changes_nothing():
    model = toy(BatchNormAct2d)
    precise_bn(model, batches_of())
    report = precise_bn(model, batches_of())
    assert max(change.mean_shift for change in report.layers.values()) < 1e-6
    assert all(abs(change.var_ratio_max - 1) < 1e-6 for change in report.layers.values())


def test_a_pass_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precise_bn(toy(), batches_of())
