"""The BatchNorm core: one layer with independent switches, usable alone in anybody's training loop."""

from bnfinetune.bn.adapt import Tent, adapt_model
from bnfinetune.bn.convert import convert_sync_bn, revert_sync_bn
from bnfinetune.bn.domains import domain, export_domain
from bnfinetune.bn.fold import fold_bn, unfold_bn
from bnfinetune.bn.fuse import fuse_bn
from bnfinetune.bn.group_norm import GroupNormReport, convert_group_norm
from bnfinetune.bn.layers import find_bn_layers, register_bn_class
from bnfinetune.bn.policy import BNPolicy, apply_policy, auto_momentum, freeze_bn, restore_bn, unfreeze_bn
from bnfinetune.bn.precise import get_bn_modules, precise_bn, update_bn_stats
from bnfinetune.bn.precise_report import PreciseBNReport
from bnfinetune.bn.ranks import merge_running_stats
from bnfinetune.bn.saving import load_policy_state, policy_state
from bnfinetune.bn.table import describe_bn
from bnfinetune.bn.updates import StatSnapshot, no_stat_updates

__all__ = [
    "BNPolicy",
    "GroupNormReport",
    "PreciseBNReport",
    "StatSnapshot",
    "Tent",
    "adapt_model",
    "apply_policy",
    "auto_momentum",
    "convert_group_norm",
    "convert_sync_bn",
    "describe_bn",
    "domain",
    "export_domain",
    "find_bn_layers",
    "fold_bn",
    "freeze_bn",
    "fuse_bn",
    "get_bn_modules",
    "load_policy_state",
    "merge_running_stats",
    "no_stat_updates",
    "policy_state",
    "precise_bn",
    "register_bn_class",
    "restore_bn",
    "revert_sync_bn",
    "unfold_bn",
    "unfreeze_bn",
    "update_bn_stats",
]
