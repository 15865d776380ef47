"""bnfinetune: fine-tuning of timm backbones with BatchNorm handled right.

Each public name is imported from its home when it is first used, so that `import bnfinetune` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfinetune.bn.convert.group_norm import convert_group_norm as convert_group_norm
    from bnfinetune.bn.folding.fold import fold_bn as fold_bn
    from bnfinetune.bn.folding.fold import unfold_bn as unfold_bn
    from bnfinetune.bn.folding.fuse import fuse_bn as fuse_bn
    from bnfinetune.bn.layers import find_bn_layers as find_bn_layers
    from bnfinetune.bn.layers import register_bn_class as register_bn_class
    from bnfinetune.bn.policy.apply import apply_policy as apply_policy
    from bnfinetune.bn.policy.apply import freeze_bn as freeze_bn
    from bnfinetune.bn.policy.apply import restore_bn as restore_bn
    from bnfinetune.bn.policy.apply import unfreeze_bn as unfreeze_bn
    from bnfinetune.bn.policy.domains import domain as domain
    from bnfinetune.bn.policy.saving import load_policy_state as load_policy_state
    from bnfinetune.bn.policy.saving import policy_state as policy_state
    from bnfinetune.bn.policy.spec import BNPolicy as BNPolicy
    from bnfinetune.bn.policy.sync import convert_sync_bn as convert_sync_bn
    from bnfinetune.bn.policy.sync import revert_sync_bn as revert_sync_bn
    from bnfinetune.bn.policy.table import describe_bn as describe_bn
    from bnfinetune.bn.policy.updates import no_stat_updates as no_stat_updates
    from bnfinetune.bn.statistics.fvcore import get_bn_modules as get_bn_modules
    from bnfinetune.bn.statistics.fvcore import update_bn_stats as update_bn_stats
    from bnfinetune.bn.statistics.precise import precise_bn as precise_bn
    from bnfinetune.diagnose.checks import check_bn as check_bn
    from bnfinetune.diagnose.drift import inspect_bn as inspect_bn
    from bnfinetune.diagnose.watch import watch_bn as watch_bn
    from bnfinetune.training.network.optim import param_groups as param_groups
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
    "BNPolicy": "bnfinetune.bn.policy.spec",
    "apply_policy": "bnfinetune.bn.policy.apply",
    "check_bn": "bnfinetune.diagnose.checks",
    "convert_group_norm": "bnfinetune.bn.convert.group_norm",
    "convert_sync_bn": "bnfinetune.bn.policy.sync",
    "describe_bn": "bnfinetune.bn.policy.table",
    "domain": "bnfinetune.bn.policy.domains",
    "find_bn_layers": "bnfinetune.bn.layers",
    "finetune": "bnfinetune.training.run",
    "fold_bn": "bnfinetune.bn.folding.fold",
    "freeze_bn": "bnfinetune.bn.policy.apply",
    "fuse_bn": "bnfinetune.bn.folding.fuse",
    "get_bn_modules": "bnfinetune.bn.statistics.fvcore",
    "inspect_bn": "bnfinetune.diagnose.drift",
    "load_policy_state": "bnfinetune.bn.policy.saving",
    "no_stat_updates": "bnfinetune.bn.policy.updates",
    "param_groups": "bnfinetune.training.network.optim",
    "policy_state": "bnfinetune.bn.policy.saving",
    "precise_bn": "bnfinetune.bn.statistics.precise",
    "register_bn_class": "bnfinetune.bn.layers",
    "restore_bn": "bnfinetune.bn.policy.apply",
    "revert_sync_bn": "bnfinetune.bn.policy.sync",
    "unfold_bn": "bnfinetune.bn.folding.fold",
    "unfreeze_bn": "bnfinetune.bn.policy.apply",
    "update_bn_stats": "bnfinetune.bn.statistics.fvcore",
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
