"""bnfinetune: fine-tuning of timm backbones with BatchNorm handled right.

Each public name is imported from its home when it is first used, so that `import bnfinetune` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfinetune.bn.absorb import absorb_bn
    from bnfinetune.bn.adapt.methods import adapt_model
    from bnfinetune.bn.average import average_networks
    from bnfinetune.bn.convert.frozen_batch_norm import convert_frozen_bn
    from bnfinetune.bn.convert.group_norm import convert_group_norm
    from bnfinetune.bn.folding.fold import fold_bn, fold_report, folded, unfold_bn
    from bnfinetune.bn.folding.fuse import fuse_bn
    from bnfinetune.bn.layers import find_bn_layers, register_bn_class
    from bnfinetune.bn.patch import load_bn, save_bn
    from bnfinetune.bn.policy.apply import apply_policy, freeze_bn, frozen, restore_bn, unfreeze_bn
    from bnfinetune.bn.policy.domains import domain, export_domain
    from bnfinetune.bn.policy.saving import load_policy_state, policy_state
    from bnfinetune.bn.policy.spec import BNPolicy, auto_momentum
    from bnfinetune.bn.policy.sync import convert_sync_bn, revert_sync_bn
    from bnfinetune.bn.policy.table import describe_bn
    from bnfinetune.bn.policy.updates import StatSnapshot, no_stat_updates
    from bnfinetune.bn.statistics.fvcore import get_bn_modules, update_bn_stats
    from bnfinetune.bn.statistics.precise import precise_bn
    from bnfinetune.bn.statistics.prior_search import choose_prior
    from bnfinetune.bn.statistics.ranks import merge_running_stats
    from bnfinetune.comparison.auto import finetune_auto
    from bnfinetune.comparison.race import compare
    from bnfinetune.diagnose.checks import check_bn
    from bnfinetune.diagnose.drift import inspect_bn
    from bnfinetune.diagnose.expected import expect
    from bnfinetune.diagnose.watch import watch_bn
    from bnfinetune.inference.predictor import load
    from bnfinetune.training.network.head import reset_head
    from bnfinetune.training.network.optim import param_groups
    from bnfinetune.training.run import finetune

__all__ = [
    "BNPolicy",
    "StatSnapshot",
    "absorb_bn",
    "adapt_model",
    "apply_policy",
    "auto_momentum",
    "average_networks",
    "check_bn",
    "choose_prior",
    "compare",
    "convert_frozen_bn",
    "convert_group_norm",
    "convert_sync_bn",
    "describe_bn",
    "domain",
    "expect",
    "export_domain",
    "find_bn_layers",
    "finetune",
    "finetune_auto",
    "fold_bn",
    "fold_report",
    "folded",
    "freeze_bn",
    "frozen",
    "fuse_bn",
    "get_bn_modules",
    "inspect_bn",
    "load",
    "load_bn",
    "load_policy_state",
    "merge_running_stats",
    "no_stat_updates",
    "param_groups",
    "policy_state",
    "precise_bn",
    "register_bn_class",
    "reset_head",
    "restore_bn",
    "revert_sync_bn",
    "save_bn",
    "unfold_bn",
    "unfreeze_bn",
    "update_bn_stats",
    "watch_bn",
]

_HOMES = {
    "BNPolicy": "bnfinetune.bn.policy.spec",
    "StatSnapshot": "bnfinetune.bn.policy.updates",
    "absorb_bn": "bnfinetune.bn.absorb",
    "adapt_model": "bnfinetune.bn.adapt.methods",
    "apply_policy": "bnfinetune.bn.policy.apply",
    "auto_momentum": "bnfinetune.bn.policy.spec",
    "average_networks": "bnfinetune.bn.average",
    "check_bn": "bnfinetune.diagnose.checks",
    "choose_prior": "bnfinetune.bn.statistics.prior_search",
    "compare": "bnfinetune.comparison.race",
    "convert_frozen_bn": "bnfinetune.bn.convert.frozen_batch_norm",
    "convert_group_norm": "bnfinetune.bn.convert.group_norm",
    "convert_sync_bn": "bnfinetune.bn.policy.sync",
    "describe_bn": "bnfinetune.bn.policy.table",
    "domain": "bnfinetune.bn.policy.domains",
    "expect": "bnfinetune.diagnose.expected",
    "export_domain": "bnfinetune.bn.policy.domains",
    "find_bn_layers": "bnfinetune.bn.layers",
    "finetune": "bnfinetune.training.run",
    "finetune_auto": "bnfinetune.comparison.auto",
    "fold_bn": "bnfinetune.bn.folding.fold",
    "fold_report": "bnfinetune.bn.folding.fold",
    "folded": "bnfinetune.bn.folding.fold",
    "freeze_bn": "bnfinetune.bn.policy.apply",
    "frozen": "bnfinetune.bn.policy.apply",
    "fuse_bn": "bnfinetune.bn.folding.fuse",
    "get_bn_modules": "bnfinetune.bn.statistics.fvcore",
    "inspect_bn": "bnfinetune.diagnose.drift",
    "load": "bnfinetune.inference.predictor",
    "load_bn": "bnfinetune.bn.patch",
    "load_policy_state": "bnfinetune.bn.policy.saving",
    "merge_running_stats": "bnfinetune.bn.statistics.ranks",
    "no_stat_updates": "bnfinetune.bn.policy.updates",
    "param_groups": "bnfinetune.training.network.optim",
    "policy_state": "bnfinetune.bn.policy.saving",
    "precise_bn": "bnfinetune.bn.statistics.precise",
    "register_bn_class": "bnfinetune.bn.layers",
    "reset_head": "bnfinetune.training.network.head",
    "restore_bn": "bnfinetune.bn.policy.apply",
    "revert_sync_bn": "bnfinetune.bn.policy.sync",
    "save_bn": "bnfinetune.bn.patch",
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
