"""Folding equals eval-mode BN in every family of timm that has BN; tests/bench/fold_families.py makes the table."""

import copy

import pytest
import timm
import torch
from timm import layers
from torch import nn

from bnfinetune.bn import freeze_bn
from bnfinetune.bn.folding.fold import fold_bn, fold_report
from tests.bn.folding.outcomes import outcome, relative_error
from tests.bn.models import randomise

# One small member of each of timm's model files with BN, and how many of its BN layers fold.
FAMILIES = {
    "halonet_h1": (42, 61),
    "test_byobnet": (14, 14),
    "convmixer_768_32": (0, 65),
    "cpubone_nano": (19, 19),
    "cs3darknet_focus_s": (31, 31),
    "cspnext_tiny": (33, 33),
    "densenet121": (59, 121),
    "dla46x_c": (48, 48),
    "dpn48b": (33, 54),
    "efficientformer_l1": (33, 33),
    "efficientformerv2_s0": (74, 75),
    "test_efficientnet": (13, 13),
    "efficientvim_m1": (38, 38),
    "efficientvit_b0": (26, 26),
    "efficientvit_m0": (112, 113),
    "fasternet_t0": (17, 17),
    "fastvit_t8": (46, 70),
    "ghostnet_050": (80, 80),
    "hardcorenas_b": (55, 55),
    "hgnetv2_b0": (42, 42),
    "hrnet_w18_small": (91, 91),
    "iformer_t": (74, 75),
    "inception_next_atto": (1, 16),
    "inception_resnet_v2": (204, 204),
    "inception_v3": (94, 94),
    "inception_v4": (149, 149),
    "lcnetv2_small": (37, 37),
    "levit_128s": (50, 52),
    "lowformer_b0": (27, 27),
    "test_coatnet": (5, 7),
    "lcnet_035": (27, 27),
    "mobilevit_xxs": (32, 32),
    "nasnetalarge": (260, 264),
    "nextvit_small": (33, 61),
    "pnasnet5large": (197, 201),
    "regnetx_002": (44, 44),
    "repghostnet_050": (80, 112),
    "repvit_m1": (106, 108),
    "res2next50": (85, 85),
    "resnest14d": (23, 23),
    "test_resnet": (15, 15),
    "resnetv2_18": (8, 17),
    "rexnet_100": (62, 62),
    "selecsls42": (41, 41),
    "legacy_seresnet18": (20, 20),
    "shvit_s1": (73, 74),
    "skresnet18": (36, 36),
    "starnet_s050": (17, 18),
    "swiftformer_xs": (21, 26),
    "tiny_vit_5m_224": (27, 27),
    "tresnet_m": (60, 60),
    "vgg11_bn": (8, 8),
    "vit_base_mci_224": (2, 2),
    "visformer_tiny": (4, 28),
    "volo_d1_224": (3, 3),
    "ese_vovnet19b_slim": (19, 19),
    "legacy_xception": (40, 40),
    "xception41": (84, 84),
    "xcit_small_12_p8_224": (3, 15),
}
QUICK = ("test_byobnet", "test_efficientnet", "test_resnet", "levit_128s", "lcnet_035", "resnetv2_18")


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5)).train()


def images_for(model: nn.Module) -> torch.Tensor:
    size, fixed = model.pretrained_cfg["input_size"][-1], model.pretrained_cfg.get("fixed_input_size")
    side = size if fixed or "halo" in model.pretrained_cfg["architecture"] else max(64, size // 64 * 32)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, layers.HardSwish, layers.HardSigmoid)


def smooth(model: nn.Module) -> nn.Module:
    """Without kinks, where roundoff alone may send a gradient another way: ReLUs near zero, maxima of near values."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, KINKED):
                setattr(parent, name, nn.Softplus())
            elif type(child) is nn.MaxPool2d:
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode))
    return model


def folded(model: nn.Module) -> nn.Module:
    return fold_bn(freeze_bn(copy.deepcopy(model).train(), affine=False)).eval()


def error(model: nn.Module, x: torch.Tensor, truth: dict[str, torch.Tensor]) -> float:
    found = outcome(model, x.to(next(model.parameters()).dtype))
    return relative_error({key: value.double() for key, value in found.items()}, truth)


def roundoff(model: nn.Module, x: torch.Tensor, truth: dict[str, torch.Tensor]) -> float:
    """The largest float32 error of three inputs that differ by a rounding: of one alone it may be small by luck."""
    ulp = torch.finfo(torch.float32).eps
    # each on a copy: LeViT keeps attention biases, with their graph, from one evaluation to the next
    return max(error(copy.deepcopy(model), x * scale, truth) for scale in (1, 1 - ulp, 1 + ulp))


def measured(name: str) -> dict[str, float]:
    """Layers folded, all BN layers, and errors: in float64, in float32, and in float32 of BN in evaluation mode."""
    plain = built(name).eval()
    x, model = images_for(plain), folded(plain)
    report = fold_report(model)
    double = error(model.double(), x, outcome(copy.deepcopy(plain).double(), x))
    truth = outcome(smooth(copy.deepcopy(plain)).double(), x)
    single, unfolded = error(folded(smooth(plain)), x, truth), roundoff(plain, x, truth)
    return {
        "folded": len(report.folded), "layers": len(report), "double": double, "single": single, "plain": unfolded
    }  # fmt: skip


def check(name: str) -> dict[str, float]:
    found = measured(name)
    assert (found["folded"], found["layers"]) == FAMILIES[name]
    # with random weights some networks, such as Visformer and HaloNet, amplify any roundoff: that of BN itself as well
    assert found["double"] < max(1e-10, 1e-6 * found["plain"])
    assert found["single"] < max(1e-4, 10 * found["plain"])
    return found


@pytest.mark.parametrize("name", QUICK)
def test_a_folded_family_equals_eval_mode_bn(name):
    check(name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in QUICK])
def test_every_folded_family_equals_eval_mode_bn(name):
    check(name)
