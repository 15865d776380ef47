"""Fused models compute what they did in evaluation, and hold no BN any more."""

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn

from bnfinetune.bn import BNPolicy, apply_policy, freeze_bn, register_bn_class
from bnfinetune.bn.folding.fold import fold_bn
from bnfinetune.bn.folding.fuse import ChannelScale, fuse_bn, scaled_layers
from bnfinetune.bn.layers import is_bn_layer
from bnfinetune.errors import LayerError, PolicyError, SelectionError
from tests.bn.models import BACKBONES, backbone, images, randomise, toy

EXAMPLE = images(1)
NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])


def has_bn(model: nn.Module) -> bool:
    return any(is_bn_layer(module) for module in model.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_fused_backbones_are_plain_and_compute_the_same(name):
    model = backbone(name)
    wanted = copy.deepcopy(model).eval()(images(2, 64))
    assert fuse_bn(model) is model
    assert model.training
    assert not has_bn(model)
    assert scaled_layers(model) == []
    kinds = {type(module).__module__.split(".")[0] for module in model.modules()}
    assert kinds == {"torch", "timm"}
    torch.testing.assert_close(model.eval()(images(2, 64)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images(2, 64)), model(images(2, 64)))
    assert not any("running" in key for key in model.state_dict())


PREPARED = {
    "frozen": lambda m: freeze_bn(m, affine=False),
    "folded": lambda m: fold_bn(freeze_bn(m), EXAMPLE),
    "live": lambda m: apply_policy(m, BNPolicy(train_stats="ghost")),
    "of timm's frozen class": freeze_batch_norm_2d,
}


@pytest.mark.parametrize("how", PREPARED)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_models_under_any_policy_fuse(norm, how):
    wanted = toy(norm).double().eval()(images().double())
    model = fuse_bn(PREPARED[how](toy(norm).double()), EXAMPLE)
    assert [type(module) for module in model] == [
        nn.Conv2d,
        nn.Identity,
        nn.ReLU,
        nn.Conv2d,
        nn.ReLU if norm is BatchNormAct2d else nn.Identity,
    ]
    torch.testing.assert_close(model(images().double()), wanted)


def test_pre_activation_layers_become_scales_and_are_listed(caplog):
    model = randomise(timm.create_model("densenet121", num_classes=5)).eval()
    wanted = model(images(2, 64))
    with caplog.at_level(logging.INFO, "bnfinetune"):
        fuse_bn(model, EXAMPLE)
    assert not has_bn(model)
    listed = scaled_layers(model)
    assert len(listed) == 62
    assert "absorbed 59 of 121 BN layers of DenseNet" in caplog.text
    assert "features.denseblock1.denselayer1.norm1" in caplog.text
    assert type(model.get_submodule(listed[0])) is ChannelScale
    torch.testing.assert_close(model(images(2, 64)), wanted, rtol=1e-4, atol=1e-5)


def test_scales_keep_the_dtype_under_autocast():
    scale = ChannelScale(torch.rand(3), torch.rand(3))
    x = images().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = scale(x)
    assert y.dtype == torch.bfloat16
    exact = x.double() * scale.weight.double().view(3, 1, 1) + scale.bias.double().view(3, 1, 1)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)


class Leaky(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.slope = nn.Parameter(torch.full((), 0.2))
        self.floor = -0.3

    def forward(self, x):
        return leaky(self, super().forward(x))


def leaky(layer, x):
    return torch.where(x > 0, x, x * layer.slope).clamp(min=layer.floor)


def test_tails_of_registered_classes_stay():
    register_bn_class(Leaky, leaky)
    wanted = toy(Leaky).eval()(images())
    model = fuse_bn(toy(Leaky), EXAMPLE)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias", "4.slope"}
    torch.testing.assert_close(model(images()), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images()), model(images()))


@pytest.mark.parametrize(
    ("conv", "affine", "trains"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_a_new_parameter_trains_if_anything_in_it_did(conv, affine, trains):
    model = toy()
    for module in model:
        module.requires_grad_(conv if isinstance(module, nn.Conv2d) else affine)
    fuse_bn(model, EXAMPLE)
    assert all(p.requires_grad == trains for p in model.parameters())


def test_half_precision_is_fused_in_double():
    model = toy().to(torch.bfloat16)
    exact = fuse_bn(copy.deepcopy(model).double(), EXAMPLE)
    fuse_bn(model, EXAMPLE)
    for (_, found), (_, wanted) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert found.equal(wanted.bfloat16())


class UsesStatistics(nn.Module):
    """Reads the layer in a way that no fusing can keep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.aliases = [self.bn]

    def forward(self, x):
        return self.aliases[0](self.conv(x))


def test_a_model_that_would_change_is_refused_and_left_as_it_was():
    model = randomise(UsesStatistics())
    modules, parameters = dict(model.named_modules()), list(model.parameters())
    wanted = copy.deepcopy(model).eval()(images())
    with pytest.raises(LayerError, match="'bn' of UsesStatistics is called by code that holds it"):
        fuse_bn(model, EXAMPLE)
    assert dict(model.named_modules()) == modules
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert model.training
    torch.testing.assert_close(model.eval()(images()), wanted)


def test_refusals_name_the_layer_and_the_remedy():
    with pytest.raises(LayerError, match=r"'4' does not normalise with running.*eval_stats='batch'"):
        fuse_bn(apply_policy(toy(), BNPolicy(eval_stats="batch", layers="4")), EXAMPLE)
    model = toy()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(LayerError, match="'1' does not normalise"):
        fuse_bn(model, EXAMPLE)
    with pytest.raises(LayerError, match="itself a BatchNorm2d"):
        fuse_bn(nn.BatchNorm2d(3), EXAMPLE)
    with pytest.raises(PolicyError, match="pass example_input"):
        fuse_bn(toy())
    with pytest.raises(SelectionError, match="no BatchNorm layer"):
        fuse_bn(fuse_bn(toy(), EXAMPLE), EXAMPLE)


def test_a_shared_layer_is_fused_at_each_of_its_places():
    model = toy()
    model[4] = model[1]
    wanted = copy.deepcopy(model).eval()(images())
    fuse_bn(model, EXAMPLE)
    torch.testing.assert_close(model(images()), wanted, rtol=1e-4, atol=1e-5)


class Detector(nn.Module):
    """Gives what fits no comparison as a whole: ragged, empty, infinite and random outputs."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), norm(6)

    def forward(self, x):
        y = self.bn(self.conv(x))
        scores = y.mean((2, 3))
        return {
            "ragged": scores[scores > torch.rand(())],
            "empty": scores[scores > 1e9],
            "masked": scores.masked_fill(torch.arange(6) < 2, float("-inf")),
            "dropped": F.dropout(y, 0.5, True),
        }


@NORMS
def test_what_a_model_returns_as_a_whole_refuses_no_right_fusion(norm):
    model = randomise(Detector(norm)).eval()
    twin = fuse_bn(copy.deepcopy(model), EXAMPLE)
    assert not any(hasattr(module, "running_mean") for module in twin.modules())
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = model(images(seed=seed))
        torch.manual_seed(seed)
        torch.testing.assert_close(twin(images(seed=seed)), wanted, rtol=1e-4, atol=1e-5)


class DependsOnSize(nn.Module):
    def __init__(self, norm: type[nn.Module], step: Callable) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU())
        self.conv, self.bn, self.step = nn.Conv2d(4, 6, 3, 2, 1), norm(6), step

    def forward(self, x):
        return self.bn(self.step(self.conv(self.stem(x))))


SIZE_STEPS = {
    "pads odd maps": lambda y: F.pad(y, (0, 1, 0, 1)) if y.shape[-1] % 2 else y,
    "cuts odd maps": lambda y: y[..., :-1].relu() if y.shape[-1] % 2 else y,
    "pools large maps": lambda y: F.max_pool2d(-y, 2) if y.shape[-1] > 8 else y,
}


@pytest.mark.parametrize("step", SIZE_STEPS)
@pytest.mark.parametrize("size", [64, 63])
@NORMS
def test_a_path_that_depends_on_the_image_size_is_not_fused_for_good(norm, size, step):
    model = randomise(DependsOnSize(norm, SIZE_STEPS[step])).eval()
    twin = fuse_bn(copy.deepcopy(model), torch.zeros(1, 3, size, size))
    for other in (40, 64, 63, 71, 72, 80, 96):
        x = torch.ones(2, 3, other, other)
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


class ReadsWeights(nn.Module):
    """Uses a conv's weight by itself too, as weight sharing in functional code does."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), norm(3)

    def forward(self, x):
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class ReadsStatistics(Detector):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.running_var.mean()


@NORMS
def test_parameters_that_are_read_elsewhere_are_not_fused_away(norm):
    model = randomise(ReadsWeights(norm)).eval()
    twin = fuse_bn(copy.deepcopy(model), EXAMPLE)
    torch.testing.assert_close(twin(images()), model(images()), rtol=1e-4, atol=1e-5)
    model = randomise(ReadsStatistics(norm)).eval()
    before = copy.deepcopy(model)
    with pytest.raises(LayerError, match="ReadsStatistics fails without its BN layers"):
        fuse_bn(model, EXAMPLE)
    torch.testing.assert_close(model(images()), before(images()))


def test_models_prepared_for_quantisation_are_refused_by_name():
    for model in (quantised(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), quantised(nn.Conv2d(3, 4, 3), nn.ReLU())):
        model.append(nn.BatchNorm2d(4))
        with pytest.raises(LayerError, match=r"'0' is a torch.ao.nn.*quantisation-aware.*before it is prepared"):
            fuse_bn(model, EXAMPLE)


def quantised(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    fused = torch.ao.quantization.fuse_modules_qat(model, [["0", "1"]])
    return torch.ao.quantization.prepare_qat(fused)
