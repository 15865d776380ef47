"""bnfinetune: fine-tuning of timm backbones with BatchNorm handled right.

Each public name is imported from its home when it is first used, so that `import bnfinetune` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfinetune.bn.convert import convert_sync_bn as convert_sync_bn
    from bnfinetune.bn.convert import revert_sync_bn as revert_sync_bn
    from bnfinetune.bn.domains import domain as domain
    from bnfinetune.bn.fold import fold_bn as fold_bn
    from bnfinetune.bn.fold import unfold_bn as unfold_bn
    from bnfinetune.bn.fuse import fuse_bn as fuse_bn
    from bnfinetune.bn.group_norm import convert_group_norm as convert_group_norm
    from bnfinetune.bn.layers import find_bn_layers as find_bn_layers
    from bnfinetune.bn.layers import register_bn_class as register_bn_class
    from bnfinetune.bn.policy import BNPolicy as BNPolicy
    from bnfinetune.bn.policy import apply_policy as apply_policy
    from bnfinetune.bn.policy import freeze_bn as freeze_bn
    from bnfinetune.bn.policy import restore_bn as restore_bn
    from bnfinetune.bn.policy import unfreeze_bn as unfreeze_bn
    from bnfinetune.bn.precise import get_bn_modules as get_bn_modules
    from bnfinetune.bn.precise import precise_bn as precise_bn
    from bnfinetune.bn.precise import update_bn_stats as update_bn_stats
    from bnfinetune.bn.saving import load_policy_state as load_policy_state
    from bnfinetune.bn.saving import policy_state as policy_state
    from bnfinetune.bn.table import describe_bn as describe_bn
    from bnfinetune.bn.updates import no_stat_updates as no_stat_updates
    from bnfinetune.diagnose.checks import check_bn as check_bn
    from bnfinetune.diagnose.drift import inspect_bn as inspect_bn
    from bnfinetune.diagnose.watch import watch_bn as watch_bn
    from bnfinetune.training.optim import param_groups as param_groups
    from bnfinetune.training.run import finetune as finetune

__all__ = [
    "BNPolicy",
    "apply_policy",
    "check_bn",
    "convert_group_norm",
    "convert_sync_bn",
    "describe_bn",
    "domain",
    "find_bn_layers",
    "finetune",
    "fold_bn",
    "freeze_bn",
    "fuse_bn",
    "get_bn_modules",
    "inspect_bn",
    "load_policy_state",
    "no_stat_updates",
    "param_groups",
    "policy_state",
    "precise_bn",
    "register_bn_class",
    "restore_bn",
    "revert_sync_bn",
    "unfold_bn",
    "unfreeze_bn",
    "update_bn_stats",
    "watch_bn",
]

_HOMES = {
    "BNPolicy": "bnfinetune.bn.policy",
    "apply_policy": "bnfinetune.bn.policy",
    "check_bn": "bnfinetune.diagnose.checks",
    "convert_group_norm": "bnfinetune.bn.group_norm",
    "convert_sync_bn": "bnfinetune.bn.convert",
    "describe_bn": "bnfinetune.bn.table",
    "domain": "bnfinetune.bn.domains",
    "find_bn_layers": "bnfinetune.bn.layers",
    "finetune": "bnfinetune.training.run",
    "fold_bn": "bnfinetune.bn.fold",
    "freeze_bn": "bnfinetune.bn.policy",
    "fuse_bn": "bnfinetune.bn.fuse",
    "get_bn_modules": "bnfinetune.bn.precise",
    "inspect_bn": "bnfinetune.diagnose.drift",
    "load_policy_state": "bnfinetune.bn.saving",
    "no_stat_updates": "bnfinetune.bn.updates",
    "param_groups": "bnfinetune.training.optim",
    "policy_state": "bnfinetune.bn.saving",
    "precise_bn": "bnfinetune.bn.precise",
    "register_bn_class": "bnfinetune.bn.layers",
    "restore_bn": "bnfinetune.bn.policy",
    "revert_sync_bn": "bnfinetune.bn.convert",
    "unfold_bn": "bnfinetune.bn.fold",
    "unfreeze_bn": "bnfinetune.bn.policy",
    "update_bn_stats": "bnfinetune.bn.precise",
    "watch_bn": "bnfinetune.diagnose.watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
