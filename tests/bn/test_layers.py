"""What is found as a BN layer, under which name, and what follows its normalisation."""

import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d, GroupNormAct, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnfinetune import (
    BNPolicy,
    apply_policy,
    check_bn,
    convert_group_norm,
    describe_bn,
    fold_bn,
    freeze_bn,
    fuse_bn,
    inspect_bn,
    no_stat_updates,
    precise_bn,
    restore_bn,
    unfreeze_bn,
)
from bnfinetune.bn.layers import bn_tail, find_bn_layers, is_bn_layer, register_bn_class, select_layers, unwrap
from bnfinetune.errors import BnFinetuneError, LayerError, SelectionError
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of, toy

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


@pytest.mark.parametrize("name", BACKBONES)
def test_the_last_layer_has_a_selector_of_its_own(name):
    model = backbone(name)
    last = list(find_bn_layers(model))[-1]
    assert list(select_layers(model, ":last")) == [last]
    assert last not in select_layers(model, "*", exclude=":last")
    assert list(select_layers(model, [":last", "bn1"])) == ["bn1", last]


def test_globs_select_by_whole_name():
    model = backbone("resnet18")
    assert list(select_layers(model, "layer1.*")) == [
        "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2",
    ]  # fmt: skip
    assert list(select_layers(model, ("bn1", "layer4.?.bn2"))) == ["bn1", "layer4.0.bn2", "layer4.1.bn2"]
    assert "layer4.0.bn1" not in select_layers(model, exclude="layer4.*")
    assert list(select_layers(model, ["bn1"])) == ["bn1"]


def names_of(selection, exclude=()):
    model = nn.Sequential(
        nn.BatchNorm2d(3), BatchNormAct2d(3), nn.BatchNorm1d(3), nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(5))
    )
    plain, under = list(select_layers(model, selection, exclude)), freeze_bn(model)
    assert list(select_layers(under, selection, exclude)) == plain
    return plain


def test_classes_and_functions_select_too():
    assert names_of(nn.BatchNorm2d) == ["0", "1", "3.1"]
    assert names_of([nn.BatchNorm1d, FrozenBatchNorm2d]) == ["2", "3.0"]
    assert names_of(lambda name, layer: len(layer.running_mean) == 5) == ["3.1"]
    assert names_of(["3.*", BatchNormAct2d, lambda name, layer: name == "0"]) == ["0", "1", "3.0", "3.1"]
    assert names_of("*", exclude=nn.BatchNorm1d) == ["0", "1", "3.0", "3.1"]
    assert names_of(nn.BatchNorm2d, exclude=[BatchNormAct2d, lambda name, layer: "." in name]) == ["0"]


def test_a_function_sees_every_name_of_a_shared_layer():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"first": norm, "second": nn.Sequential(norm)})
    assert select_layers(model, lambda name, layer: name == "second.0") == {"first": norm}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_every_call_that_selects_takes_all_selectors(name):
    model = backbone(name)
    first, *others = find_bn_layers(model)
    freeze = BNPolicy(update_stats="none", train_stats="running", layers=lambda name, layer: name == first)
    apply_policy(model, [freeze, BNPolicy(affine="frozen", layers=nn.BatchNorm2d, exclude=first)])
    rows = {row.name: (row.train_stats, row.affine) for row in describe_bn(model)}
    assert rows == {first: ("running", "trained")} | dict.fromkeys(others, ("batch", "frozen"))
    with torch.no_grad():
        report = precise_bn(
            model, [images(4)], layers=nn.BatchNorm2d, exclude=[first, lambda name, _: name in others[2:]]
        )
        assert list(report.layers) == others[:2]
        seen = inspect_bn(model, [images(4)], layers=nn.BatchNorm2d, exclude=lambda name, _: name not in others[:2])
    assert list(seen.layers) == others[:2]
    convert_group_norm(model, layers=[nn.BatchNorm2d], exclude=[lambda name, layer: name == first])
    assert list(find_bn_layers(model)) == [first]


def test_policies_of_globs_and_classes_are_pickled():
    policy = BNPolicy(affine="frozen", layers=["layer1.*", nn.BatchNorm2d], exclude="bn1")
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"layers": nn.BatchNorm1d}, r"BatchNorm1d matches no BN layer; classes are BatchNorm2d \(20\)"),
        ({"layers": ["bn1", lambda name, layer: False]}, r"<lambda> matches no BN layer; near names: bn1"),
        ({"exclude": nn.BatchNorm2d}, "leaves no BN layer"),
        ({"exclude": nn.SyncBatchNorm}, "SyncBatchNorm matches no BN layer"),
        ({"layers": 3}, "3 selects no layers; give a glob, a class, a function of name and layer"),
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


def scripted(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return torch.jit.script(toy(norm))


def traced(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return torch.jit.trace(toy(norm).eval(), images(2, 12))


def nested(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(nn.Identity(), scripted(norm))


def loaded(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(scripted(norm), file)
    return torch.jit.load(io.BytesIO(file.getvalue()))


CHANGES = {
    "freeze": freeze_bn,
    "unfreeze": unfreeze_bn,
    "precise": lambda model: precise_bn(model, [images(4, 12)], include_frozen=True),
    "inspect": lambda model: inspect_bn(model, [images(4, 12)]),
    "group norm": lambda model: convert_group_norm(model, [images(4, 12)]),
    "fuse": lambda model: fuse_bn(model, images(2, 12)),
    "no updates": lambda model: no_stat_updates(model).__enter__(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("made", [scripted, traced, nested, loaded])
class TestScripted:
    def test_its_bn_layers_are_found_and_refused_by_name(self, made, norm):
        model = made(norm)
        names = list(find_bn_layers(model))
        assert [name.split(".")[-1] for name in names] == ["1", "4"]
        assert [row.train_stats for row in describe_bn(model)] == ["?", "?"]
        assert "BN layer" not in str(check_bn(model))
        state = tensors_of(model)
        for change in CHANGES.values():
            with pytest.raises(LayerError, match=f"BN layer '{names[0]}' is scripted or traced by torch.jit"):
                change(model)
        assert not differing(tensors_of(model), state)

    def test_the_plain_net_beside_it_is_handled_alone(self, made, norm):
        model = nn.Sequential(nn.ModuleDict({"jit": made(norm)}), toy(norm))
        alone = toy(norm)
        plain = {"exclude": "0.*"}
        apply_policy(model, BNPolicy(train_stats="running", update_stats="none", affine="frozen", **plain))
        x = images(4, 12)
        torch.testing.assert_close(model[1].train()(x), freeze_bn(alone).train()(x))
        assert [row.train_stats for row in describe_bn(model)] == ["?", "?", "running", "running"]
        model.forward = lambda x: model[1](x)
        precise_bn(model, [x], include_frozen=True, **plain)
        precise_bn(alone, [x], include_frozen=True)
        torch.testing.assert_close(model[1].state_dict(), alone.state_dict())
        restore_bn(model)
        assert type(model[1][4]) is norm


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "beside",
    [
        lambda: torch.jit.script(nn.Sequential(nn.Identity(), nn.Flatten(0))),
        lambda: torch.jit.freeze(scripted().eval()),
    ],
)
def test_what_is_scripted_without_bn_layers_is_passed_over(beside):
    model = nn.ModuleDict({"transform": beside(), "net": toy()})
    model.forward = lambda x: model["net"](x)
    assert list(find_bn_layers(model)) == ["net.1", "net.4"]
    freeze_bn(model)
    for change in ("precise", "inspect", "unfreeze"):
        CHANGES[change](model)
    fold_bn(freeze_bn(model), images(2, 12))
    with pytest.raises(SelectionError, match="no BatchNorm layer in RecursiveScriptModule"):
        freeze_bn(model["transform"])


def test_the_split_norm_of_timm_is_refused_by_name():
    model = timm.layers.convert_splitbn_model(toy(), 2)
    with pytest.raises(LayerError, match="SplitBatchNorm2d"):
        bn_tail(find_bn_layers(model)["1"])
