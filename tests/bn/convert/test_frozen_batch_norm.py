"""Frozen classes of torchvision and timm in place of BN: the same function, the same names, nothing of this package."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnfinetune.bn import (
    BNPolicy,
    apply_policy,
    convert_frozen_bn,
    domain,
    find_bn_layers,
    fold_bn,
    freeze_bn,
    register_bn_class,
)
from bnfinetune.errors import LayerError, PolicyError, SelectionError
from tests.bn.look_alikes import LOOK_ALIKES
from tests.bn.models import BACKBONES, backbone, differing, images, tensors_of, toy

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def prepared(model: nn.Module, state: str) -> nn.Module:
    """A model as it is, under a policy, or folded too."""
    if state != "plain":
        freeze_bn(model)
    return fold_bn(model, images(2).to(next(model.parameters()).dtype)) if state == "folded" else model


@pytest.mark.parametrize("state", ["plain", "frozen", "folded"])
@pytest.mark.parametrize("name", BACKBONES)
class TestBackbones:
    def test_computes_in_either_mode_what_bn_did_in_evaluation(self, name, state):
        model, x = backbone(name).double(), images(2).double()
        for index, layer in enumerate(find_bn_layers(model).values()):
            layer.eps = 1e-5 * (index + 1)
        twin = copy.deepcopy(model).eval()
        acts = [layer.act for layer in find_bn_layers(model).values() if hasattr(layer, "act")]
        assert convert_frozen_bn(prepared(model, state)) is model
        layers = find_bn_layers(model).values()
        assert {type(layer) for layer in layers} <= {FrozenBatchNorm2d, FrozenBatchNormAct2d}
        assert any(type(layer) is FrozenBatchNorm2d for layer in layers)
        kept = [layer.act for layer in layers if type(layer) is FrozenBatchNormAct2d]
        assert set(kept) == {act for act in acts if not isinstance(act, nn.Identity)}
        for mode in (True, False):
            outputs = [each(x) for each in (model.train(mode), twin)]
            torch.testing.assert_close(*outputs, **EXACT)
            convs = [[m.weight for m in each.modules() if isinstance(m, nn.Conv2d)] for each in (model, twin)]
            grads = [torch.autograd.grad(y.square().sum(), ws) for y, ws in zip(outputs, convs, strict=True)]
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
        assert not differing(tensors_of(model), tensors_of(model.train()))

    def test_checkpoints_of_before_and_after_fit_both(self, name, state):
        model, other = backbone(name), backbone(name)
        saved = tensors_of(model)
        convert_frozen_bn(prepared(model, state))
        x = images(2)
        wanted = model(x)
        model.load_state_dict(saved, strict=True)
        other.load_state_dict(model.state_dict(), strict=True)
        torch.testing.assert_close(other.eval()(x), wanted, rtol=1e-4, atol=1e-5)
        assert set(saved) - set(model.state_dict()) == {key for key in saved if key.endswith("num_batches_tracked")}


def test_what_is_left_needs_nothing_of_this_package(tmp_path):
    model = convert_frozen_bn(prepared(backbone("efficientnet_b0"), "folded"))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        f"import pickle, sys; pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'));"
        "print([name for name in sys.modules if name.startswith('bnfinetune')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "norm", [nn.SyncBatchNorm, SyncBatchNormAct, FrozenBatchNorm2d, FrozenBatchNormAct2d, *LOOK_ALIKES]
)
def test_other_classes_for_images_too(norm):
    model = toy(norm).double().eval()
    x = images(2, 12).double()
    wanted = model(x)
    torch.testing.assert_close(convert_frozen_bn(model)(x), wanted, **EXACT)


def test_layers_without_affine_and_of_half_precision():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3).bfloat16()).eval()
    converted = convert_frozen_bn(copy.deepcopy(model))
    x = images(2, 4)
    torch.testing.assert_close(converted[0](x), model[0](x))
    assert {buffer.dtype for buffer in converted[1].buffers()} == {torch.bfloat16}
    torch.testing.assert_close(converted[1](x.bfloat16()), model[1](x.bfloat16()), rtol=0.02, atol=0.02)


def test_only_what_is_selected_and_of_the_domain_in_use():
    model = apply_policy(toy(BatchNormAct2d), BNPolicy(domains=("a", "b"), domain_affine="own"))
    x = images(4, 12)
    for name in ("a", "b"):
        with domain(model, name):
            model.train()(x * (2 if name == "a" else 3))
    with domain(model.eval(), "b"), torch.no_grad():
        wanted = model[:2](x)
        model[1].bn_b_bias.add_(1)
        convert_frozen_bn(model, exclude=BatchNormAct2d)
    assert isinstance(model[1], FrozenBatchNorm2d)
    assert isinstance(model[4], BatchNormAct2d)
    torch.testing.assert_close(model[:2](x), wanted + 1)


def test_a_shared_layer_stays_shared_and_a_single_one_is_returned():
    norm = nn.BatchNorm2d(3)
    model = convert_frozen_bn(nn.Sequential(norm, nn.ReLU(), norm))
    assert model[0] is model[2]
    assert type(convert_frozen_bn(nn.BatchNorm2d(2))) is FrozenBatchNorm2d


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def with_bn1d() -> nn.Module:
    return nn.Sequential(*toy(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (with_bn1d, LayerError, r"BN layer '7', a BatchNorm1d, does not take images \(N, C, H, W\)"),
        (lambda: toy(nn.BatchNorm3d), LayerError, "BN layer '4', a BatchNorm3d, does not take images"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), LayerError, "'0'.*eval_stats='batch'"),
        (lambda: apply_policy(toy(), BNPolicy(eval_stats="mix")), LayerError, "'1'.*eval_stats='mix'"),
        (lambda: toy(Shifted), LayerError, "BN layer '4', a Shifted, does something of its own after normalising"),
        (lambda: nn.DataParallel(toy()), PolicyError, "convert_frozen_bn got a DataParallel; convert the bare model"),
        (lambda: nn.Sequential(nn.ReLU()), SelectionError, "no BatchNorm layer"),
    ],
)
def test_refusals_leave_the_model_alone(model, error, message):
    register_bn_class(Shifted, tail=lambda layer, x: x + 1)
    model = model()
    types, state = [type(module) for module in model.modules()], tensors_of(model)
    with pytest.raises(error, match=message):
        convert_frozen_bn(model)
    assert [type(module) for module in model.modules()] == types
    assert differing(tensors_of(model), state) == []


def test_the_remedy_of_a_mixed_model_works():
    model = convert_frozen_bn(with_bn1d(), layers=nn.BatchNorm2d)
    assert [type(layer) for layer in find_bn_layers(model).values()] == [FrozenBatchNorm2d] * 2 + [nn.BatchNorm1d]
