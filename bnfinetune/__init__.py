"""bnfinetune: fine-tuning of timm backbones with BatchNorm handled right.

Each public name is imported from its home when it is first used, so that `import bnfinetune` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfinetune.bn.layers import find_bn_layers as find_bn_layers
    from bnfinetune.bn.layers import register_bn_class as register_bn_class
    from bnfinetune.training.optim import param_groups as param_groups
    from bnfinetune.training.run import finetune as finetune

__all__ = [
    "find_bn_layers",
    "finetune",
    "param_groups",
    "register_bn_class",
]

_HOMES = {
    "find_bn_layers": "bnfinetune.bn.layers",
    "finetune": "bnfinetune.training.run",
    "param_groups": "bnfinetune.training.optim",
    "register_bn_class": "bnfinetune.bn.layers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
