"""The smallest model with BN of every timm module that has one, and the smallest image it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Family:
    model: str
    size: int = 32
    batch: int = 4
    kwargs: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "byoanet": Family("botnet26t_256", size=256, batch=2),
    "byobnet": Family("test_byobnet"),
    "convmixer": Family("convmixer_768_32"),
    "cpubone": Family("cpubone_nano"),
    "cspnet": Family("cs3darknet_focus_s"),
    "cspnext": Family("cspnext_tiny"),
    "densenet": Family("densenet121"),
    "dla": Family("dla46x_c"),
    "dpn": Family("dpn48b"),
    "efficientformer": Family("efficientformer_l1", size=224, batch=2),
    "efficientformer_v2": Family("efficientformerv2_s0", kwargs={"img_size": 32}),
    "efficientnet": Family("test_efficientnet"),
    "efficientvim": Family("efficientvim_m1"),
    "efficientvit_mit": Family("efficientvit_b0"),
    "efficientvit_msra": Family("efficientvit_m0", kwargs={"img_size": 32}),
    "fasternet": Family("fasternet_t0"),
    "fastvit": Family("fastvit_t8"),
    "ghostnet": Family("ghostnet_050"),
    "hardcorenas": Family("hardcorenas_a"),
    "hgnet": Family("hgnetv2_b0"),
    "hrnet": Family("hrnet_w18_small"),
    "iformer": Family("iformer_t"),
    "inception_next": Family("inception_next_atto"),
    "inception_resnet_v2": Family("inception_resnet_v2", size=96),
    "inception_v3": Family("inception_v3", size=96),
    "inception_v4": Family("inception_v4", size=96),
    "lcnetv2": Family("lcnetv2_small"),
    "levit": Family("levit_128s", kwargs={"img_size": 32}),
    "lowformer": Family("lowformer_b0"),
    "maxxvit": Family("test_coatnet", kwargs={"img_size": 32}),
    "mobilenetv3": Family("mobilenetv3_small_050"),
    "mobilevit": Family("mobilevit_xxs"),
    "nasnet": Family("nasnetalarge", kwargs={"num_features": 1056, "stem_size": 32}),
    "nextvit": Family("nextvit_small"),
    "pnasnet": Family("pnasnet5large"),
    "regnet": Family("regnetx_002"),
    "repghost": Family("repghostnet_050"),
    "repvit": Family("repvit_m1"),
    "res2net": Family("res2next50"),
    "resnest": Family("resnest14d"),
    "resnet": Family("resnet10t"),
    "resnetv2": Family("resnetv2_18"),
    "rexnet": Family("rexnet_100"),
    "selecsls": Family("selecsls42"),
    "senet": Family("legacy_seresnet18"),
    "shvit": Family("shvit_s1"),
    "sknet": Family("skresnet18"),
    "starnet": Family("starnet_s150"),
    "swiftformer": Family("swiftformer_xs", kwargs={"img_size": 32}),
    "tiny_vit": Family("tiny_vit_5m_224"),
    "tresnet": Family("tresnet_m"),
    "vgg": Family("vgg11_bn", kwargs={"mlp_ratio": 0.01}),
    "visformer": Family("visformer_tiny", kwargs={"img_size": 32}),
    "vision_transformer_hybrid": Family("vit_base_mci_224", kwargs={"img_size": 32}),
    "volo": Family("volo_d1_224", kwargs={"img_size": 32}),
    "vovnet": Family("ese_vovnet19b_dw"),
    "xception": Family("legacy_xception"),
    "xception_aligned": Family("xception41p"),
    "xcit": Family("xcit_nano_12_p8_224", kwargs={"img_size": 32}),
}

QUICK = ("byobnet", "efficientnet", "levit", "mobilenetv3", "regnet", "resnet", "resnetv2", "vovnet")
"""Families for tests that are not slow: plain and fused BN, BN behind linear layers, before convs and at the end."""

LARGE = ("byoanet", "inception_resnet_v2", "inception_v4", "nasnet", "pnasnet", "vision_transformer_hybrid")
"""Families whose tests take longest."""


def each_family() -> list[Any]:
    """All families, marked by how long they take, to parametrise a test."""
    slow, long = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.long]
    return [
        pytest.param(module, marks=() if module in QUICK else long if module in LARGE else slow) for module in FAMILIES
    ]


WITHOUT_BN = {
    "beit",
    "cait",
    "coat",
    "convit",
    "convnext",
    "crossvit",
    "csatv2",
    "davit",
    "deepseek_vit",
    "deit",
    "edgenext",
    "eva",
    "focalnet",
    "gcvit",
    "gemma4_vit",
    "hiera",
    "hieradet_sam2",
    "mambaout",
    "metaformer",
    "mlp_mixer",
    "mobilenetv5",
    "mvitv2",
    "naflexvit",
    "nest",
    "nfnet",
    "pit",
    "pvt_v2",
    "qwen3_vit",
    "rdnet",
    "sequencer",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "tnt",
    "twins",
    "vision_transformer",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "vitamin",
}
