"""The embedded backbone: timm's `test_resnet`, pretrained by this project on printed characters.

Importing this module registers `bnf_resnet` with timm, weights included, so that
`timm.create_model("bnf_resnet", pretrained=True)` is the one way to it. The architecture is exactly timm's own
`test_resnet`, and the model's `pretrained_cfg` says so: a folder exported after fine-tuning names an architecture that
timm knows by itself.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import test_resnet
from torch import nn

from bnfinetune.demo.alphabet import CLASSES, IMAGE_SIZE

__all__ = ["bnf_resnet"]

WEIGHTS: Final = Path(__file__).parent / "weights" / "bnf_resnet.safetensors"
"""The shipped weights, made by `recipe=pretrain_characters`."""

default_cfgs = generate_default_cfgs(
    {
        "bnf_resnet.characters": {
            "file": str(WEIGHTS),
            "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
            "pool_size": (1, 1),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "num_classes": len(CLASSES),
            "label_names": CLASSES,
            "first_conv": "conv1.0",
            "classifier": "fc",
            "license": "apache-2.0",
            "description": "test_resnet at 32 pixels, pretrained on printed characters by bnfinetune",
        }
    }
)


@register_model
def bnf_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the embedded backbone; every argument is one of `timm.create_model`.

    Args:
        pretrained: Load the shipped weights. A head of another size than theirs starts at random.
        **kwargs: Passed on to timm, such as `num_classes`, `in_chans`, `features_only` or `drop_rate`.
    """
    source = resolve_pretrained_cfg("bnf_resnet", kwargs.pop("pretrained_cfg", None))
    model: nn.Module = test_resnet(
        pretrained, pretrained_cfg=asdict(replace(source, architecture="test_resnet")), **kwargs
    )
    return model
