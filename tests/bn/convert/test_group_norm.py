"""GroupNorm in place of BN: near the network it was, and honest about how near."""

import logging

import pytest
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, StdConv2d
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, convert_group_norm, find_bn_layers, freeze_bn
from bnfinetune.errors import LayerError, PolicyError, SelectionError, StatisticsError
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of, toy


def trained(name: str) -> nn.Module:
    """A backbone whose running statistics describe the test images."""
    model = backbone(name)
    with torch.no_grad():
        torch.optim.swa_utils.update_bn([images(32, seed=seed) for seed in range(3)], model)
    return model.eval()


def relative_gap(model: nn.Module, wanted: torch.Tensor, x: torch.Tensor) -> float:
    with torch.no_grad():
        return ((model.eval()(x) - wanted).norm() / (wanted - wanted.mean(0)).norm()).item()


@pytest.mark.parametrize("name", BACKBONES)
def test_calibration_brings_the_outputs_near_and_reports_the_true_gap(name):
    model, plain, reports = trained(name), trained(name), []
    data = images(64, seed=5)
    with torch.no_grad():
        wanted = model(data[32:])
    acts = [layer.act for layer in find_bn_layers(model).values() if hasattr(layer, "act")]
    weights = [layer.weight for layer in find_bn_layers(model).values()]
    assert convert_group_norm(model, [data[:40], (data[40:], None)], num_groups=1, on_report=reports.append) is model
    convert_group_norm(plain, num_groups=1)
    (report,) = reports
    assert report.gap == pytest.approx(relative_gap(model, wanted, data[32:]), rel=1e-4)
    assert report.uncalibrated_gap == pytest.approx(relative_gap(plain, wanted, data[32:]), rel=1e-4)
    if name == "resnet18":  # on noise, random weights as deep as EfficientNet's leave nothing to come near to
        assert report.gap < 0.75 * report.uncalibrated_gap
    assert (report.layers, report.samples) == (len(weights), 32)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert all(norm.weight is weight for norm, weight in zip(norms, weights, strict=True))
    assert all(
        norm.act is act for norm, act in zip([n for n in norms if isinstance(n, GroupNormAct)], acts, strict=True)
    )
    with pytest.raises(SelectionError, match="no BatchNorm layer"):
        find_bn_layers(model)


def test_a_single_layer_is_fitted_by_least_squares():
    model = nn.Sequential(nn.BatchNorm2d(8)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 2, 8))
        model[0].running_mean.copy_(torch.linspace(-3, 3, 8))
    x = images(16, size=6).double().repeat(1, 3, 1, 1)[:, :8] * 2 + 1
    y = model(x[:8]).detach()
    convert_group_norm(model, [x], num_groups=2, min_group_size=1, on_report=lambda report: None)
    xhat = torch.nn.functional.group_norm(x[:8], 2, eps=1e-5)
    for channel in range(8):
        design = torch.stack([xhat[:, channel].flatten(), torch.ones(8 * 36, dtype=torch.double)], 1)
        weight, bias = torch.linalg.lstsq(design, y[:, channel].flatten()).solution
        torch.testing.assert_close(model[0].weight[channel], weight)
        torch.testing.assert_close(model[0].bias[channel], bias)


def test_groups_divide_the_channels_and_keep_their_size():
    def groups(channels: int, **options) -> int:
        return convert_group_norm(nn.BatchNorm2d(channels), **options).num_groups

    assert [groups(c) for c in (512, 96, 40, 16, 6)] == [32, 6, 2, 1, 1]
    assert [groups(c, min_group_size=1) for c in (512, 96, 40, 6)] == [32, 32, 20, 6]
    assert groups(96, num_groups=1) == 1


def test_a_sample_alone_gives_what_it_gives_in_a_batch():
    model = convert_group_norm(toy(BatchNormAct2d)).train()
    x = images(3, size=12)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_weight_standardisation_reaches_the_convolutions_before():
    model, reports = toy(), []
    weights = [model[0].weight, model[3].weight]
    convert_group_norm(model, [images(8, size=12)], weight_standardisation=True, on_report=reports.append)
    assert (type(model[0]), type(model[3]), reports[0].standardised) == (StdConv2d, StdConv2d, 2)
    assert model[0].weight is weights[0]
    std, mean = torch.std_mean(weights[0].flatten(1), 1, correction=0)
    filters = (weights[0] - mean.view(-1, 1, 1, 1)) / (std.square() + 1e-6).sqrt().view(-1, 1, 1, 1)
    x = images(2, size=12)
    torch.testing.assert_close(model[0](x), nn.functional.conv2d(x, filters, model[0].bias))


def test_some_layers_may_stay_and_policies_on_the_others_are_undone(caplog):
    model = apply_policy(freeze_bn(toy()), BNPolicy(domains="b"))
    with caplog.at_level(logging.WARNING):
        convert_group_norm(model, [images(8, size=12)], layers="4")
    assert list(find_bn_layers(model)) == ["1"]
    assert model[4].weight.requires_grad
    assert not model[1].weight.requires_grad
    assert "GroupNorm in place of 1 BN layers: on 4 held-out samples outputs differ by" in caplog.text


class Activated(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (toy, {"data": []}, StatisticsError, "got 0 samples"),
        (toy, {"weight_standardisation": True}, PolicyError, "needs data"),
        (toy, {"layers": "7"}, SelectionError, "'7' matches no BN layer"),
        (lambda: nn.DataParallel(toy()), {}, PolicyError, "convert the bare model"),
        (lambda: toy(Activated), {}, LayerError, "BN layer '4' is a Activated"),
    ],
)
def test_refusals_leave_the_model_alone(model, options, error, message):
    model = model()
    types, state = [type(module) for module in model.modules()], tensors_of(model)
    with pytest.raises(error, match=message):
        convert_group_norm(model, **options)
    assert [type(module) for module in model.modules()] == types
    assert differing(tensors_of(model), state) == []


def test_a_failing_forward_leaves_the_model_alone():
    model = toy()
    state, types = tensors_of(model), [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError):
        convert_group_norm(model, [torch.zeros(4, 5, 12, 12)], weight_standardisation=True)
    assert (differing(tensors_of(model), state), [type(m) for m in model.modules()]) == ([], types)
