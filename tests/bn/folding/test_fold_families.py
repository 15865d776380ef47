"""Folding equals eval-mode BN in every family of timm that has BN; tests/bench/fold_families.py makes the table."""

import copy
from unittest.mock import patch

import pytest
import timm
import torch
from timm import layers
from torch import nn

from bnfinetune.bn import freeze_bn
from bnfinetune.bn.folding import arithmetic
from bnfinetune.bn.folding.fold import fold_bn, fold_report
from tests.bn.families import FAMILIES, Family, each_family
from tests.bn.folding.outcomes import outcome, relative_error
from tests.bn.models import randomise

# How many of the BN layers of each family's smallest member fold.
FOLDED = {
    "byoanet": (28, 31),
    "byobnet": (14, 14),
    "convmixer": (0, 65),
    "cpubone": (19, 19),
    "cspnet": (31, 31),
    "cspnext": (33, 33),
    "densenet": (59, 121),
    "dla": (48, 48),
    "dpn": (33, 54),
    "efficientformer": (33, 33),
    "efficientformer_v2": (74, 75),
    "efficientnet": (13, 13),
    "efficientvim": (38, 38),
    "efficientvit_mit": (26, 26),
    "efficientvit_msra": (112, 113),
    "fasternet": (17, 17),
    "fastvit": (46, 70),
    "ghostnet": (80, 80),
    "hardcorenas": (34, 34),
    "hgnet": (42, 42),
    "hrnet": (91, 91),
    "iformer": (74, 75),
    "inception_next": (1, 16),
    "inception_resnet_v2": (204, 204),
    "inception_v3": (94, 94),
    "inception_v4": (149, 149),
    "lcnetv2": (37, 37),
    "levit": (50, 52),
    "lowformer": (27, 27),
    "maxxvit": (5, 7),
    "mobilenetv3": (34, 34),
    "mobilevit": (32, 32),
    "nasnet": (260, 264),
    "nextvit": (33, 61),
    "pnasnet": (197, 201),
    "regnet": (44, 44),
    "repghost": (80, 112),
    "repvit": (106, 108),
    "res2net": (85, 85),
    "resnest": (23, 23),
    "resnet": (14, 14),
    "resnetv2": (8, 17),
    "rexnet": (62, 62),
    "selecsls": (41, 41),
    "senet": (20, 20),
    "shvit": (73, 74),
    "sknet": (36, 36),
    "starnet": (23, 24),
    "swiftformer": (21, 26),
    "tiny_vit": (27, 27),
    "tresnet": (60, 60),
    "vgg": (8, 8),
    "visformer": (4, 28),
    "vision_transformer_hybrid": (2, 2),
    "volo": (3, 3),
    "vovnet": (23, 23),
    "xception": (40, 40),
    "xception_aligned": (28, 40),
    "xcit": (3, 15),
}


def built(family: Family) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(family.model, num_classes=5, **family.kwargs)).train()


def images_for(family: Family) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, family.size, family.size, generator=generator, dtype=torch.float64)


SMOOTH = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.LeakyReLU), nn.Softplus),
    **dict.fromkeys((nn.Hardswish, layers.HardSwish), nn.SiLU),
    **dict.fromkeys((nn.Hardsigmoid, layers.HardSigmoid), nn.Sigmoid),
}


def smooth(model: nn.Module) -> nn.Module:
    """Without kinks, where roundoff alone may send a gradient another way: ReLUs near zero, maxima of near values."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in SMOOTH:
                setattr(parent, name, SMOOTH[type(child)]())
            elif type(child) is nn.MaxPool2d:
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode))
    return model


def folded(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return fold_bn(freeze_bn(copy.deepcopy(model).train(), affine=False), x.float()).eval()


def error(model: nn.Module, x: torch.Tensor, truth: dict[str, torch.Tensor]) -> float:
    found = outcome(model, x.to(next(model.parameters()).dtype))
    return relative_error({key: value.double() for key, value in found.items()}, truth)


def roundoff(model: nn.Module, x: torch.Tensor, truth: dict[str, torch.Tensor]) -> float:
    """The largest float32 error of three inputs that differ by a rounding: of one alone it may be small by luck."""
    ulp = torch.finfo(torch.float32).eps
    # each on a copy: LeViT keeps attention biases, with their graph, from one evaluation to the next
    return max(error(copy.deepcopy(model), x * scale, truth) for scale in (1, 1 - ulp, 1 + ulp))


@patch.object(arithmetic, "has_fewer_outputs", lambda *_: False)  # else, of small images, late convs would not fold
def measured(family: Family) -> dict[str, float]:
    """Layers folded, all BN layers, and errors: in float64, in float32, and in float32 of BN in evaluation mode."""
    plain, x = built(family).eval(), images_for(family)
    model = folded(plain, x)
    report = fold_report(model)
    double = error(model.double(), x, outcome(copy.deepcopy(plain).double(), x))
    truth = outcome(smooth(copy.deepcopy(plain)).double(), x)
    single, unfolded = error(folded(smooth(plain), x), x, truth), roundoff(plain, x, truth)
    return {
        "folded": len(report.folded), "layers": len(report), "double": double, "single": single, "plain": unfolded
    }  # fmt: skip


def check(module: str) -> dict[str, float]:
    found = measured(FAMILIES[module])
    assert (found["folded"], found["layers"]) == FOLDED[module]
    # with random weights some networks, such as Visformer, amplify any roundoff: that of BN itself as well
    assert found["double"] < max(1e-10, 1e-6 * found["plain"])
    assert found["single"] < max(1e-4, 10 * found["plain"])
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", each_family())
def test_a_folded_family_equals_eval_mode_bn(module):
    check(module)
