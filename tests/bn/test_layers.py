"""What is found as a BN layer, under which name, and what follows its normalisation."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d, GroupNormAct, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnfinetune.bn.layers import bn_tail, find_bn_layers, is_bn_layer, register_bn_class, select_layers, unwrap
from bnfinetune.errors import BnFinetuneError, LayerError, SelectionError
from tests.bn.models import backbone, toy

BN = [
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.BatchNorm3d(4),
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.SyncBatchNorm(4),
    BatchNormAct2d(4),
    SyncBatchNormAct(4),
    FrozenBatchNorm2d(4),
    FrozenBatchNormAct2d(4),
]
OTHERS = [
    nn.InstanceNorm2d(4, track_running_stats=True),
    nn.GroupNorm(2, 4),
    nn.LayerNorm(4),
    GroupNormAct(4, num_groups=2),
    EvoNorm2dB0(4),
    nn.Conv2d(4, 4, 1),
]


@pytest.mark.parametrize("layer", BN, ids=lambda layer: type(layer).__name__)
def test_every_kind_of_bn_is_found_by_behaviour(layer):
    assert is_bn_layer(layer)
    assert find_bn_layers(nn.Sequential(nn.Identity(), layer)) == {"1": layer}
    assert find_bn_layers(layer) == {"": layer}


@pytest.mark.parametrize("layer", OTHERS, ids=lambda layer: type(layer).__name__)
def test_other_norms_are_not_bn(layer):
    assert not is_bn_layer(layer)
    with pytest.raises(SelectionError, match="no BatchNorm layer in Sequential"):
        find_bn_layers(nn.Sequential(layer))


def test_names_are_those_of_named_modules_and_come_in_order():
    model = backbone("efficientnet_b0")
    wanted = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(find_bn_layers(model)) == wanted


def test_wrappers_leave_no_trace_in_names():
    model = toy()
    model[0] = torch.compile(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    wrapped = torch.compile(nn.DataParallel(torch.optim.swa_utils.AveragedModel(model)))
    assert list(find_bn_layers(wrapped)) == ["0.1", "1", "4"]
    assert type(unwrap(wrapped)) is nn.Sequential


def test_a_shared_layer_comes_once_and_answers_to_all_its_names():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"first": norm, "second": nn.Sequential(norm)})
    assert find_bn_layers(model) == {"first": norm}
    assert select_layers(model, "second.*") == {"first": norm}


def test_a_lazy_layer_is_named_until_it_has_a_size():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(LayerError, match=r"'0' is a LazyBatchNorm2d without a size yet; run one forward"):
        find_bn_layers(model)
    model(torch.randn(2, 3, 4, 4))
    assert list(find_bn_layers(model)) == ["0"]


def test_globs_select_by_whole_name():
    model = backbone("resnet18")
    assert list(select_layers(model, "layer1.*")) == [
        "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2",
    ]  # fmt: skip
    assert list(select_layers(model, ("bn1", "layer4.?.bn2"))) == ["bn1", "layer4.0.bn2", "layer4.1.bn2"]
    assert "layer4.0.bn1" not in select_layers(model, exclude="layer4.*")
    assert list(select_layers(model, ["bn1"])) == ["bn1"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"layers": "layer9.*"}, r"'layer9\.\*' matches no BN layer; near names: layer"),
        ({"layers": ("bn1", "bnx")}, r"'bnx' matches no BN layer; near names: .*bn1"),
        ({"exclude": "neck.*"}, r"'neck\.\*' matches no BN layer"),
        ({"exclude": "*"}, "leaves no BN layer"),
        ({"layers": ""}, "'' matches no BN layer"),
    ],
)
def test_a_selection_of_nothing_is_an_error_with_a_hint(selection, message):
    with pytest.raises(SelectionError, match=message) as error:
        select_layers(backbone("resnet18"), **selection)
    assert isinstance(error.value, BnFinetuneError | LookupError | ValueError)


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_the_tail_is_what_follows_normalising(name):
    for layer in find_bn_layers(backbone(name).eval()).values():
        x = torch.randn(2, layer.num_features, 3, 3)
        xhat = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        torch.testing.assert_close(bn_tail(layer)(xhat), layer(x))


class ShiftedBN(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_forward_of_its_own_is_refused_until_registered():
    layer = ShiftedBN(3)
    with pytest.raises(LayerError, match=r"ShiftedBN, whose own forward is unknown here; call register_bn_class"):
        bn_tail(layer)
    register_bn_class(ShiftedBN, tail=lambda layer, x: x + 1)
    assert bn_tail(layer)(torch.zeros(1)) == 1
    with pytest.raises(LayerError, match="pass the layer's class"):
        register_bn_class(layer)


def test_a_subclass_that_keeps_its_parents_forward_is_known():
    class Named(BatchNormAct2d):
        pass

    assert bn_tail(Named(2, act_layer=nn.ReLU))(torch.tensor([-1.0])) == 0


def test_the_split_norm_of_timm_is_refused_by_name():
    model = timm.layers.convert_splitbn_model(toy(), 2)
    with pytest.raises(LayerError, match="SplitBatchNorm2d"):
        bn_tail(find_bn_layers(model)["1"])
