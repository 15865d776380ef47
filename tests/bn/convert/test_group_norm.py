"""GroupNorm in place of BN: near the network it was, and honest about how near."""

import copy
import logging

import pytest
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, StdConv2d
from torch import nn
from torch.utils._pytree import tree_leaves

from bnfinetune.bn import BNPolicy, apply_policy, convert_group_norm, find_bn_layers, freeze_bn, register_bn_class
from bnfinetune.errors import LayerError, PolicyError, SelectionError, StatisticsError
from tests.bn.look_alikes import LOOK_ALIKES
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


class ByName(nn.Module):
    """Calls its norms by the names of their arguments and gives several outputs."""

    def __init__(self, norm: type[nn.Module], form: str) -> None:
        super().__init__()
        self.body, self.form = toy(norm), form

    def forward(self, x):
        for module in self.body:
            named = {"x" if isinstance(module, BatchNormAct2d | GroupNormAct) else "input": x}
            x = module(**named) if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) else module(x)
        forms = {
            "map": x,
            "tuple": (x, [x.mean((2, 3))]),
            "dict": {"logits": x.mean((2, 3)), "maps": x, "size": len(x), "loss": x.mean()},
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["map", "tuple", "dict"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_named_arguments_and_many_outputs(norm, form):
    model, direct, reports = ByName(norm, form).eval(), toy(norm).eval(), []
    reference, data = copy.deepcopy(model), images(16, 12)
    convert_group_norm(model, [data], num_groups=2, min_group_size=1, on_report=reports.append)
    convert_group_norm(direct, [data], num_groups=2, min_group_size=1, on_report=reports.append)
    torch.testing.assert_close(model.body.state_dict(), direct.state_dict())
    got, wanted = (
        torch.cat([leaf.flatten(1) for leaf in tree_leaves(each(data[8:])) if getattr(leaf, "ndim", 0)], 1)
        for each in (model, reference)
    )
    assert reports[0].gap == pytest.approx(((got - wanted).norm() / (wanted - wanted.mean(0)).norm()).item(), rel=1e-5)
    assert 0 < reports[0].gap < reports[0].uncalibrated_gap


def test_agreement_of_maps_is_by_position():
    model, reports = toy().eval(), []
    reference, data = copy.deepcopy(model), images(16, 12)
    convert_group_norm(model, [data], num_groups=2, min_group_size=1, on_report=reports.append)
    same = model(data[8:]).argmax(1) == reference(data[8:]).argmax(1)
    assert reports[0].agreement == pytest.approx(same.double().mean().item())
    assert 0.2 < reports[0].agreement < 1


@pytest.mark.parametrize("cls", LOOK_ALIKES)
def test_frozen_classes_become_trainable_group_norm(cls):
    model, plain, reports = toy(cls).double(), toy().double(), []
    plain.load_state_dict(model.state_dict(), strict=False)
    plain[4].eps = max(LOOK_ALIKES[cls], 1e-30)
    data = images(16, 12).double()
    for each in (model, plain):
        convert_group_norm(each, [data], num_groups=2, min_group_size=1, on_report=reports.append)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert reports[0].gap == pytest.approx(reports[1].gap)
    assert model[4].weight.requires_grad


def tied(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    model = toy(norm)
    model[4].weight = model[1].weight
    return model


def tied_elsewhere() -> nn.Module:
    model = nn.ModuleDict({"net": toy(), "scale": nn.GroupNorm(1, 6)})
    model["scale"].bias = model["net"][4].bias
    model.forward = lambda x: model["scale"](model["net"](x))
    return model


def test_tied_layers_are_untied_by_the_remedy_or_convert_without_data():
    model = convert_group_norm(tied(), num_groups=2)
    assert model[1].weight is model[4].weight
    model, apart = tied(), toy()
    apart[4].weight.data.copy_(apart[1].weight)
    layer = model[4]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    for each in (model, apart):
        convert_group_norm(each, [images(8, 12)], on_report=lambda report: None)
    torch.testing.assert_close(model.state_dict(), apart.state_dict())


def holding_ddp(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = toy(norm)
    return nn.Sequential(nn.Identity(), wrapper)


class Scalar(nn.Module):
    def forward(self, x):
        return {"loss": x.mean(), "classes": x.argmax(1)}


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (toy, {"data": []}, StatisticsError, "got 0 samples"),
        (toy, {"weight_standardisation": True}, PolicyError, "needs data"),
        (toy, {"layers": "7"}, SelectionError, "'7' matches no BN layer"),
        (lambda: nn.DataParallel(toy()), {}, PolicyError, "convert the bare model"),
        (lambda: toy(Shifted), {}, LayerError, "BN layer '4' is a Shifted, whose tail is its own"),
        (tied, {"data": [images(4, 12)]}, LayerError, "BN layer '1' shares its weight with '4.weight'"),
        (
            lambda: tied(BatchNormAct2d),
            {"data": [images(4, 12)], "layers": "4"},
            LayerError,
            "'4' shares .* '1.weight'",
        ),
        (tied_elsewhere, {"data": [images(4, 12)]}, LayerError, "'net.4' shares its bias with 'scale.bias'"),
        (holding_ddp, {}, PolicyError, "got a DistributedDataParallel; convert the bare model"),
        (lambda: holding_ddp(BatchNormAct2d), {"data": [images(4, 12)]}, PolicyError, "convert the bare model"),
        (
            lambda: nn.Sequential(*toy(), Scalar()),
            {"data": [images(4, 12)]},
            StatisticsError,
            "gives none with one entry",
        ),
    ],
)
def test_refusals_leave_the_model_alone(model, options, error, message):
    register_bn_class(Shifted, tail=lambda layer, x: x + 1)
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
